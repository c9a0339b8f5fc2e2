from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

import layerscope
from layerscope.errors import ConfigError, ModelError
from layerscope.models import Add, Start
from layerscope.models.backends.huggingface import files, fingerprints, loading, placing, reading
from layerscope.models.backends.huggingface import weights as weights_module
from layerscope.models.backends.huggingface.loading import load_pretrained
from layerscope.models.backends.huggingface.placing import Request, decide
from layerscope.models.backends.huggingface.weights import DTYPES, Unread, read_headers
from layerscope.models.devices import Device, parse_dtype
from layerscope.models.memory import Sizes
from support.shared import shared_path
from support.tiny_models import tiny, tiny_tokenizer

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def shard(folder: Path) -> list[Path]:
    """Split the weights into two files with an index."""
    tensors = load_file(weights(folder))
    weights(folder).unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    paths: list[Path] = []
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        paths.append(folder / f"model-{number:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, paths[-1], metadata={"format": "pt"})
        index |= dict.fromkeys(part, paths[-1].name)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return paths


def refusal(source: Any, **options: Any) -> str:
    """Load, expecting a ModelError of one line, and return its message."""
    with pytest.raises(ModelError) as caught:
        load_pretrained(source, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFolder:
    def test_the_weights_are_those_on_disk(self, saved: Path) -> None:
        loaded = load_pretrained(str(saved), device="cpu")
        expected = load_file(weights(saved))
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert (loaded.name, loaded.kind, loaded.revision) == ("tiny-llama", "folder", None)
        assert not loaded.model.training
        assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)

    def test_half_precision_files_become_float32_on_cpu(self, folder: Path) -> None:
        def halve(tensors: dict[str, torch.Tensor]) -> None:
            tensors.update({name: tensor.half() for name, tensor in tensors.items()})

        rewrite(folder, halve)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        loaded = load_pretrained(folder, device="cpu")
        assert {tensor.dtype for tensor in loaded.model.parameters()} == {torch.float32}
        expected = load_file(weights(folder))[WEIGHT].float()
        assert torch.equal(loaded.model.state_dict()[WEIGHT], expected)
        assert load_pretrained(folder, device="cpu", dtype="bf16").dtype == torch.bfloat16

    def test_shards(self, saved: Path, folder: Path) -> None:
        whole = load_pretrained(saved, device="cpu")
        paths = shard(folder)
        parts = load_pretrained(folder, device="cpu")
        left, right = whole.model.state_dict(), parts.model.state_dict()
        assert all(torch.equal(left[name], right[name]) for name in left)
        digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
        assert parts.weights_hash == hashlib.sha256(digests.encode()).hexdigest()

    def test_tied_heads_are_not_missing(self, tmp_path: Path) -> None:
        tiny("llama_tied").save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        model = load_pretrained(tmp_path, device="cpu").model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_unused_weights_are_noted(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({"extra.head": torch.zeros(2)}))
        assert load_pretrained(folder, device="cpu").provenance()["unused_weights"] == [
            "extra.head"
        ]

    def test_transformers_stays_quiet_and_is_left_as_found(
        self, saved: Path, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        rewrite(folder, lambda tensors: tensors.pop(WEIGHT))
        level = transformers_logging.get_verbosity()
        load_pretrained(saved, device="cpu")
        refusal(folder)
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == level
        assert transformers_logging.is_progress_bar_enabled()

    def test_another_tokenizer_may_be_given(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        tokenizer = tiny_tokenizer(bos=False)
        loaded = load_pretrained(folder, tokenizer=tokenizer, device="cpu")
        assert loaded.tokenizer is tokenizer


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        assert "there is no folder" in refusal(tmp_path / "absent")
        assert "there is no folder" in refusal("./absent/model")
        assert "there is no folder" in refusal("a/b/c")

    def test_a_file(self, saved: Path) -> None:
        assert "give the folder" in refusal(weights(saved))

    def test_a_folder_that_is_not_a_model(self, tmp_path: Path) -> None:
        assert "no config.json" in refusal(tmp_path)

    def test_no_weights(self, folder: Path) -> None:
        weights(folder).unlink()
        assert "has no weights" in refusal(folder)
        (folder / "adapter_config.json").write_text("{}")
        assert "only an adapter" in refusal(folder)

    def test_pickled_weights_are_not_read(self, folder: Path) -> None:
        torch.save(load_file(weights(folder)), folder / "pytorch_model.bin")
        weights(folder).unlink()
        message = refusal(folder)
        assert "pickled" in message and "save_pretrained" in message

    @pytest.mark.parametrize("kept", [0, 4, 20, 5000, -1])
    def test_truncated_weights(self, folder: Path, kept: int) -> None:
        weights(folder).write_bytes(weights(folder).read_bytes()[:kept])
        message = refusal(folder)
        assert "truncated" in message and "model.safetensors" in message

    def test_damaged_weights(self, folder: Path) -> None:
        content = bytearray(weights(folder).read_bytes())
        content[8:20] = b"\xff" * 12
        weights(folder).write_bytes(bytes(content))
        assert "damaged header" in refusal(folder)

    def test_a_git_lfs_pointer(self, folder: Path) -> None:
        weights(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "git lfs pull" in refusal(folder)

    def test_a_missing_or_truncated_shard(self, folder: Path) -> None:
        paths = shard(folder)
        content = paths[1].read_bytes()
        paths[1].unlink()
        assert f"lacks {paths[1].name}" in refusal(folder)
        paths[1].write_bytes(content[:-8])
        assert "truncated" in refusal(folder)

    def test_a_damaged_index(self, folder: Path) -> None:
        shard(folder)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        assert "index.json is damaged" in refusal(folder)

    def test_missing_weights_are_never_made_up(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop(WEIGHT))
        message = refusal(folder)
        assert "lacks 1 weights" in message and WEIGHT in message

    def test_an_untied_head_that_is_missing(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
        assert "lm_head.weight" in refusal(folder)

    def test_weights_of_another_shape(self, folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
        message = refusal(folder)
        assert "model.norm.weight" in message and "[3]" in message and "[32]" in message

    def test_a_damaged_config(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": ')
        assert "damaged config.json" in refusal(folder)

    def test_a_config_of_no_or_unknown_type(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        assert "names no model_type" in refusal(folder)
        (folder / "config.json").write_text('{"model_type": "perceptron9"}')
        assert "'perceptron9'" in refusal(folder)

    def test_a_model_with_its_own_code_is_not_run_unasked(self, folder: Path) -> None:
        (folder / "evil.py").write_text("raise SystemExit('ran')\n")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
        (folder / "config.json").write_text(json.dumps(config))
        assert "trust_remote_code=True" in refusal(folder)

    def test_an_encoder(self, tmp_path: Path) -> None:
        config = BertConfig(
            vocab_size=384,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        model = BertForMaskedLM(config)
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        for message in (refusal(tmp_path), refusal(model, tokenizer=tiny_tokenizer())):
            assert "encoder" in message and "AutoModelForCausalLM" in message

    def test_an_encoder_decoder(self, tmp_path: Path) -> None:
        config = T5Config(vocab_size=384, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
        model = T5ForConditionalGeneration(config)
        model.save_pretrained(tmp_path)
        for message in (refusal(tmp_path), refusal(model, tokenizer=tiny_tokenizer())):
            assert "encoder-decoder" in message and "AutoModelForCausalLM" in message

    def test_no_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        assert "has no tokenizer" in refusal(folder)

    def test_a_damaged_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        assert "cannot load the tokenizer" in refusal(folder)

    def test_a_revision_of_a_folder_or_model(self, saved: Path) -> None:
        assert "hub ids only" in refusal(saved, revision="main")
        model = tiny("llama")
        assert "already built" in refusal(model, tokenizer=tiny_tokenizer(), revision="main")

    def test_an_unknown_device_is_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="unknown device"):
            load_pretrained(tmp_path, device="gpu")


class TestTokenizerSize:
    def test_a_tokenizer_of_a_larger_model(self, tmp_path: Path) -> None:
        model = tiny("llama", vocab_size=200)
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        for message in (refusal(tmp_path), refusal(model, tokenizer=tiny_tokenizer())):
            assert "ids up to 383" in message and "200 tokens" in message

    def test_a_padded_vocabulary_is_fine(self, recwarn: pytest.WarningsRecorder) -> None:
        load_pretrained(tiny("llama", vocab_size=512), tokenizer=tiny_tokenizer())
        assert not recwarn.list

    def test_a_far_smaller_tokenizer_is_warned_about(self) -> None:
        with pytest.warns(UserWarning, match="384 tokens and .* 1000"):
            load_pretrained(tiny("llama", vocab_size=1000), tokenizer=tiny_tokenizer())

    def test_a_special_token_that_the_model_lacks_is_tolerated_a_word_is_not(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        load_pretrained(tiny("llama"), tokenizer=tokenizer)
        tokenizer.add_tokens(["word"])
        assert "ids up to 385" in refusal(tiny("llama"), tokenizer=tokenizer)


class TestBuiltModel:
    def test_it_is_neither_moved_nor_cast_unless_asked(self) -> None:
        model = tiny("llama", dtype=torch.float16).train()
        loaded = load_pretrained(model, tokenizer=tiny_tokenizer())
        assert loaded.model is model and loaded.dtype == torch.float16
        assert not model.training
        assert (loaded.kind, loaded.name) == ("memory", "LlamaForCausalLM")
        assert load_pretrained(model, tokenizer=tiny_tokenizer(), device="cpu").dtype == (
            torch.float16
        )
        assert load_pretrained(model, tokenizer=tiny_tokenizer(), dtype="fp32").dtype == (
            torch.float32
        )

    def test_it_needs_its_tokenizer(self) -> None:
        assert "pass its tokenizer" in refusal(tiny("llama"))

    def test_it_needs_an_unembedding(self) -> None:
        model = LlamaModel(tiny("llama").config)
        assert "no unembedding" in refusal(model, tokenizer=tiny_tokenizer())

    def test_other_objects(self) -> None:
        assert "cannot load a Linear" in refusal(torch.nn.Linear(2, 2), tokenizer=tiny_tokenizer())


class TestFingerprints:
    def test_the_weights_hash_is_the_sha256_of_the_file(self, folder: Path) -> None:
        before = load_pretrained(folder, device="cpu").weights_hash
        assert before == hashlib.sha256(weights(folder).read_bytes()).hexdigest()
        rewrite(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
        after = load_pretrained(folder, device="cpu").weights_hash
        assert after == hashlib.sha256(weights(folder).read_bytes()).hexdigest() != before

    def test_a_file_is_hashed_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = fingerprints.hash_files([weights(folder)])
        monkeypatch.setattr(hashlib, "file_digest", None)
        assert fingerprints.hash_files([weights(folder)]) == first

    def test_files_of_the_hub_cache_carry_their_hash(self, tmp_path: Path) -> None:
        digest = "ab" * 32
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / digest).write_bytes(b"not hashed")
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
        assert fingerprints.hash_files([tmp_path / "model.safetensors"]) == digest

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_built_model_is_hashed_as_it_is_now(self, dtype: torch.dtype) -> None:
        model = tiny("llama", dtype=dtype)
        loaded = load_pretrained(model, tokenizer=tiny_tokenizer())
        same = load_pretrained(tiny("llama", dtype=dtype), tokenizer=tiny_tokenizer())
        before = loaded.weights_hash
        assert before == same.weights_hash
        with torch.no_grad():
            model.get_input_embeddings().weight[3, 5] += 1
        assert loaded.weights_hash != before

    def test_the_tokenizer_hash_ignores_padding_and_truncation_only(self) -> None:
        tokenizer = tiny_tokenizer()
        before = fingerprints.hash_tokenizer(tokenizer)
        tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=2)
        assert fingerprints.hash_tokenizer(tokenizer) == before
        assert fingerprints.hash_tokenizer(tiny_tokenizer(bos=False)) != before
        tokenizer.add_tokens(["word"])
        assert fingerprints.hash_tokenizer(tokenizer) != before

    def test_provenance_is_json(self, saved: Path) -> None:
        provenance = json.loads(json.dumps(load_pretrained(saved, device="cpu").provenance()))
        assert provenance["id"] == str(saved) and provenance["dtype"] == "float32"
        assert len(provenance["weights_sha256"]) == len(provenance["tokenizer_sha256"]) == 64
        assert provenance["versions"]["torch"] == torch.__version__


class TestHub:
    """The hub is never asked: the cache and its answers are made up here."""

    def test_a_complete_snapshot_in_the_cache_is_used_without_network(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        snapshot = Path(shutil.copytree(saved, tmp_path / "0123abc"))
        calls: list[bool] = []

        def fake(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
            calls.append(local_files_only)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        loaded = load_pretrained("someone/tiny-llama", device="cpu")
        assert (loaded.name, loaded.source) == ("tiny-llama", "someone/tiny-llama")
        assert (loaded.kind, loaded.revision) == ("hub", "0123abc")
        assert calls == [True]
        (snapshot / "tokenizer.json").unlink()
        refusal("someone/tiny-llama")
        assert calls == [True, True, False]

    def test_neither_cached_nor_reachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fake(repo: str, **_: Any) -> str:
            raise LocalEntryNotFoundError("no\nnetwork")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        message = refusal("someone/absent")
        assert "neither a folder here nor in the Hugging Face cache" in message

    def test_what_the_hub_says_becomes_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fake(repo: str, **_: Any) -> str:
            raise OSError("401 Client Error.\n\nRepository Not Found\nfor url")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        assert "cannot get someone/absent at revision 'v2'" in refusal(
            "someone/absent", revision="v2"
        )

    def test_long_errors_are_cut(self) -> None:
        assert files.one_line(ValueError("\n  first\nsecond")) == "first"
        assert files.one_line(ValueError("")) == "ValueError"
        assert len(files.one_line(ValueError("x" * 1000))) == 300


@pytest.mark.real_model
@pytest.mark.parametrize(
    "name", ["stories260K", "babyllama-tok105", "gpt-nano-sort", "mingpt-adder"]
)
def test_real_models_load(name: str) -> None:
    path = shared_path("models", name)
    loaded = load_pretrained(path, device="cpu")
    assert loaded.name == name and loaded.dtype == torch.float32
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.weights_hash == digest
    assert loaded.provenance()["n_unused_weights"] == 0


class TestPlacement:
    """Devices and their free memory are made up; the weights are real."""

    def here(self, monkeypatch: pytest.MonkeyPatch, *devices: Device) -> None:
        monkeypatch.setattr(loading, "present", lambda: devices)

    def cpu(self, free: int) -> Device:
        return Device("cpu", 2**40, free, torch.float32)

    def test_too_little_memory_is_refused_before_anything_is_read(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.here(monkeypatch, self.cpu(100 * 2**20))
        monkeypatch.setattr(loading, "read", None)
        message = refusal(saved)
        needed = re.search(
            r"needs ([\d.]+) MiB in bfloat16 on cpu, where 100 MiB are free", message
        )
        assert needed is not None
        assert f"{float(needed[1]) - 100:.0f} MiB are missing" in message
        assert "nothing here holds it" in message

    def test_what_would_fit_is_named(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here(
            monkeypatch,
            Device("cuda:0", 2**40, 2**40, torch.bfloat16, "made up"),
            self.cpu(100 * 2**20),
        )
        assert "what would fit: dtype 'float32' on cuda:0" in refusal(saved)

    def test_bfloat16_where_only_that_fits(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = Sizes("m", "files", 10**9, 10**9, n_layers=3, d_model=32, d_vocab=384)
        monkeypatch.setattr(loading, "read_sizes", lambda *_, **__: sizes)
        self.here(monkeypatch, self.cpu(3 * 2**30))
        provenance = load_pretrained(saved).provenance()
        assert provenance["dtype"] == "bfloat16"
        assert "float32 does not fit" in provenance["dtype_reason"]
        first, last = provenance["load_attempts"]
        assert (first["dtype"], first["outcome"]) == ("float32", "skipped")
        assert (last["dtype"], last["outcome"]) == ("bfloat16", "loaded")

    def test_memory_that_runs_out_leads_to_the_next_placement(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = Device("cuda:0", 2**40, 2**40, torch.bfloat16)
        self.here(monkeypatch, card, self.cpu(2**40))
        once = reading._read_once

        def crowded(source: Any, candidate: Any, request: Any) -> Any:
            if candidate.where == "cuda:0":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return once(source, candidate, request)

        monkeypatch.setattr(reading, "_read_once", crowded)
        loaded = load_pretrained(saved, device="auto")
        assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
        provenance = json.loads(json.dumps(loaded.provenance()))
        assert provenance["placement"] == "cpu"
        assert provenance["load_attempts"] == [
            {
                "device": "cuda:0",
                "dtype": "bfloat16",
                "outcome": "failed",
                "reason": "memory ran out while loading",
            },
            {
                "device": "cpu",
                "dtype": "float32",
                "outcome": "loaded",
                "reason": "policy: float32 on CPU",
            },
        ]

    def test_memory_that_runs_out_everywhere(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def crowded(*_: Any) -> Any:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(reading, "_read_once", crowded)
        message = refusal(saved)
        assert "memory ran out" in message and "layerscope fit" in message

    def test_provenance_holds_no_measurement(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_pretrained(saved, device="cpu").provenance()
        self.here(monkeypatch, self.cpu(2**39))
        assert load_pretrained(saved, device="cpu").provenance() == first


class TestDeviceMap:
    def cards(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def test_one_device_needs_no_accelerate(self, saved: Path) -> None:
        for device_map in ({"": "cpu"}, {"model": "cpu", "lm_head": torch.device("cpu")}, "cpu"):
            loaded = load_pretrained(saved, device_map=device_map)
            assert loaded.provenance()["placement"] == "cpu"
            assert loaded.provenance()["device_map"] is None
        assert load_pretrained(saved, device_map="auto").device.type == "cpu"

    @pytest.mark.parametrize("device_map", ["auto", {"model": 0, "lm_head": "cuda:1"}])
    def test_several_cards_need_accelerate(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, device_map: Any
    ) -> None:
        self.cards(monkeypatch, 2)
        monkeypatch.setattr(placing, "missing", list)
        with pytest.raises(ModelError, match="pip install accelerate"):
            load_pretrained(saved, device_map=device_map)

    def test_the_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cards(monkeypatch, 2)
        monkeypatch.setattr(placing, "missing", lambda _: [])
        assert Request.of(None, None, "auto") == Request(("cuda:0", "cuda:1"), None, "auto")
        given = {"model": 1, "lm_head": "cuda"}
        assert Request.of(None, "bf16", given) == Request(
            ("cuda:0", "cuda:1"), torch.bfloat16, {"model": "cuda:1", "lm_head": "cuda:0"}
        )

    def test_all_cards_of_a_map_are_one_placement(self) -> None:
        cards = [Device(f"cuda:{index}", 2**40, 2**36, torch.bfloat16) for index in (0, 1)]
        sizes = Sizes("m", "files", 10**9, 10**9, n_layers=3, d_model=32, d_vocab=384)
        request = Request(("cuda:0", "cuda:1"), None, "auto")
        (only,) = decide(sizes, request, cards).tried
        assert only.where == "cuda:0+cuda:1"

    @pytest.mark.parametrize("where", ["disk", "cpu"])
    def test_offloading_is_refused(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        self.cards(monkeypatch, 1)
        with pytest.raises(ModelError, match="lenses cannot read"):
            load_pretrained(saved, device_map={"model": 0, "lm_head": where})

    def test_mistakes(self, saved: Path) -> None:
        with pytest.raises(ConfigError, match="not both"):
            load_pretrained(saved, device="cpu", device_map="auto")
        with pytest.raises(ConfigError, match="empty"):
            load_pretrained(saved, device_map={})
        with pytest.raises(ConfigError, match="unknown device"):
            load_pretrained(saved, device_map="fast")
        model = tiny("llama")
        with pytest.raises(ModelError, match="already built"):
            load_pretrained(model, tokenizer=tiny_tokenizer(), device_map="auto")

    def test_hooks_work_under_those_of_accelerate(self) -> None:
        accelerate = pytest.importorskip("accelerate", reason="needs: pip install accelerate")
        plain = layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())
        model: Any = tiny("llama")
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        moved = layerscope.load(model, tokenizer=tiny_tokenizer())
        edit = Add("resid_post.0", torch.ones(32))
        expected = plain.run("One two three", capture="resid_post.*", edits=[edit])
        found = moved.run("One two three", capture="resid_post.*", edits=[edit])
        assert torch.equal(found.logits, expected.logits)
        start = Start(1, expected["resid_post.0"])
        again = moved.run("One two three", start=start, logits="last")
        torch.testing.assert_close(again.logits[:, 0], expected.logits[:, -1])


class TestOtherFormats:
    def test_mlx(self, folder: Path) -> None:
        packing = {"group_size": 64, "bits": 4}
        config = json.loads((folder / "config.json").read_text())
        both = {"quantization": packing, "quantization_config": packing}
        (folder / "config.json").write_text(json.dumps(config | both))
        assert "backend='mlx'" in refusal(folder)

    def test_gguf(self, folder: Path) -> None:
        weights(folder).unlink()
        (folder / "tiny-q4.gguf").write_bytes(b"GGUF")
        for source in (folder, folder / "tiny-q4.gguf"):
            message = refusal(source)
            assert "GGUF" in message and "gguf_file='tiny-q4.gguf'" in message


class TestReading:
    """Weights are read to their dtype and device a piece at a time."""

    @pytest.mark.parametrize(
        "family", ["llama", "llama_tied", "gpt2", "gpt_neox", "gemma2", "phi3"]
    )
    @pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bf16")])
    def test_the_values_are_those_that_transformers_loads(
        self, tmp_path: Path, family: str, stored: str, wanted: str
    ) -> None:
        tiny(family, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        dtype = parse_dtype(wanted)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
        loaded = load_pretrained(tmp_path, device="cpu", dtype=wanted)
        ours = loaded.model.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert {tensor.dtype for tensor in ours.values()} == {dtype}
        assert loaded.model.config.name_or_path == str(tmp_path)
        pointers = [tensor.data_ptr() % 4 for tensor in ours.values()]
        assert not any(pointers)

    def test_experts_are_merged(self, tmp_path: Path) -> None:
        config = AutoConfig.for_model(
            "mixtral",
            vocab_size=384,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
        ours = load_pretrained(tmp_path, device="cpu", dtype="bf16").model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_the_generation_config_comes_along(self, folder: Path) -> None:
        content = {"eos_token_id": [2, 7], "max_new_tokens": 12}
        (folder / "generation_config.json").write_text(json.dumps(content))
        for dtype in ("float32", "bfloat16"):
            model: Any = load_pretrained(folder, device="cpu", dtype=dtype).model
            assert model.generation_config.eos_token_id == [2, 7]

    @pytest.mark.parametrize("kind", list(DTYPES))
    def test_pieces_are_put_together(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(weights_module, "_BUFFER_BYTES", 64)
        values = torch.arange(7 * 31).remainder(2).view(7, 31).to(DTYPES[kind])
        save_file({"a": values, "b": values[0, 0].clone()}, tmp_path / "x.safetensors")
        entries = read_headers([tmp_path / "x.safetensors"])
        assert entries["a"].kind == kind and entries["a"].numel == 7 * 31
        for name, expected in (("a", values), ("b", values[0, 0])):
            for dtype in (values.dtype, torch.float32, torch.float64):
                found = Unread(entries[name])[...].to(device="cpu", dtype=dtype)
                assert torch.equal(found, expected.to(dtype)) and found.dtype == dtype

    def test_a_file_that_shrinks_is_noticed(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        save_file({"a": torch.ones(100)}, file)
        entry = read_headers([file])["a"]
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(EOFError):
            Unread(entry).to(dtype=torch.float32)

    def test_a_device_replaces_the_one_asked_for(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
        entry = read_headers([tmp_path / "x.safetensors"])["a"]
        found = Unread(entry, torch.device("meta")).to("cpu", torch.bfloat16)
        assert found.device.type == "meta"

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
    def test_the_peak_is_the_weights(self, tmp_path: Path, wanted: str) -> None:
        from benchmarks.bench_load import measure

        # 38 million weights stored in bfloat16: 77 MB, or 154 MB in float32.
        sizes = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048}
        shape = {**sizes, "num_hidden_layers": 8, "num_attention_heads": 8}
        config = AutoConfig.for_model("llama", **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        found = measure(tmp_path, wanted)
        assert found["weights"] > 70e6
        # Coarse: benchmarks/results/load.json has the figures of a model three times as large.
        assert found["resident"] < 1.15 * found["weights"]
