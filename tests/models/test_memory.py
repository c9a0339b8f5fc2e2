"""What a model needs is counted, not guessed, and goes where it fits."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerscope.errors import ConfigError
from layerscope.models.backends.huggingface.sizes import read_sizes
from layerscope.models.backends.huggingface.weights import read_headers
from layerscope.models.devices import Device
from layerscope.models.memory import (
    EIGHT_BIT,
    FOUR_BIT,
    Format,
    KvLayer,
    Sizes,
    Workload,
    choose,
    estimate,
    format_of,
    from_name,
    placements,
    show_bytes,
)
from layerscope.models.memory.choose import (
    RESERVE,
    fitting_placements,
    longest_positions,
    remedies,
)
from layerscope.models.memory.estimate import READOUT_BYTES
from layerscope.readout import readout
from support.tiny_models import FAMILIES, UNLISTED, tiny

GIB = 2**30
FP32, BF16 = Format("float32", torch.float32), Format("bfloat16", torch.bfloat16)
MOE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def sized(billions: float, **changes: object) -> Sizes:
    """A model of a round size, of which nothing but its weights takes room."""
    count = round(billions * 1e9)
    given = {"n_layers": 10, "d_model": 8, "d_vocab": 100, "linear": round(0.9 * count)} | changes
    return Sizes("m", "files", count, count, **given)  # type: ignore[arg-type]


def card(index: int, free: float, dtype: torch.dtype = torch.bfloat16) -> Device:
    return Device(f"cuda:{index}", round(80 * GIB), round(free * GIB), dtype)


def cpu(free: float) -> Device:
    return Device("cpu", round(256 * GIB), round(free * GIB), torch.float32)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "millions"),
        [
            ("EleutherAI/pythia-160m", 160),
            ("Qwen/Qwen2.5-0.5B-Instruct", 500),
            ("Qwen/Qwen2.5-7B-Instruct-1M", 7000),
            ("meta-llama/Meta-Llama-3-70B", 70_000),
            ("HuggingFaceTB/SmolLM2-1_7B", 1700),
            ("stories260K", 0.26),
            ("TinyLlama-1.1B-step-1431k-3T", 1100),
            ("0.5B-from-2B", 2000),
        ],
    )
    def test_numbers(self, name: str, millions: float) -> None:
        found = from_name(name)
        assert found is not None and not found.exact
        assert found.parameters == found.active == pytest.approx(millions * 1e6)

    def test_experts_share_attention_and_embeddings(self) -> None:
        found = from_name("mistralai/Mixtral-8x7B-v0.1")
        assert found is not None
        assert found.parameters == pytest.approx(46.7e9, rel=0.01)
        assert found.active == pytest.approx(12.9e9, rel=0.03)

    def test_active_parameters_in_the_name(self) -> None:
        found = from_name("Qwen/Qwen3-30B-A3B")
        assert found is not None
        assert (found.parameters, found.active) == (30 * 10**9, 3 * 10**9)

    @pytest.mark.parametrize("name", ["gpt2", "model-4bit", "llama-8bits", "v2", "abc"])
    def test_no_number(self, name: str) -> None:
        assert from_name(name) is None


class TestCounting:
    @pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
    def test_parameters_are_those_of_the_model(self, family: str) -> None:
        model = tiny(family)
        sizes = read_sizes(family, model.config, {})
        assert sizes.parameters == sum(tensor.numel() for tensor in model.parameters())
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert sizes.embedding == embedding.weight.numel()
        assert sizes.unembedding == head.weight.numel()
        assert sizes.tied == (head.weight is embedding.weight)
        assert sizes.origin == "configuration"

    def test_experts(self) -> None:
        config = AutoConfig.for_model("mixtral", **MOE)
        model = AutoModelForCausalLM.from_config(config)
        sizes = read_sizes("moe", config, {})
        routed = sum(
            tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name
        )
        total = sum(tensor.numel() for tensor in model.parameters())
        assert (sizes.experts, sizes.n_experts, sizes.experts_per_token) == (routed, 8, 2)
        assert (sizes.parameters, sizes.active) == (total, total - routed + routed // 4)

    def test_files_say_what_is_stored(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        model = tiny("llama_tied", dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        entries = read_headers([tmp_path / "model.safetensors"])
        sizes = read_sizes("m", model.config, entries)
        assert sizes.origin == "files"
        assert sizes.stored == {"BF16": sizes.parameters}

    def test_files_with_more_than_the_model_are_noted(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        tiny("llama").save_pretrained(tmp_path)
        entries = read_headers([tmp_path / "model.safetensors"])
        fewer = tiny("llama", num_hidden_layers=2).config
        assert "more than config.json describes" in read_sizes("m", fewer, entries).notes[0]
        assert read_sizes("m", tiny("llama").config, entries).notes == ()

    def test_what_layers_cache(self) -> None:
        # Keys and values of 2 key-value heads of width 8.
        assert read_sizes("m", tiny("llama").config, {}).kv == (KvLayer(32),) * 3
        assert read_sizes("m", tiny("mistral").config, {}).kv == (KvLayer(32, 4),) * 3
        windows = [layer.window for layer in read_sizes("m", tiny("gemma2").config, {}).kv]
        assert windows == [4, None, 4, None]

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "qwen3"])
    def test_the_cache_is_as_large_as_transformers_makes_it(self, family: str) -> None:
        model = tiny(family)
        ids = torch.randint(3, 300, (2, 11))
        past = model(ids, use_cache=True).past_key_values
        # A sliding layer keeps window - 1 tokens between passes; the window itself during one.
        held = sum(
            (layer.keys.numel() + layer.values.numel())
            // layer.keys.shape[-2]
            * min(11, getattr(layer, "sliding_window", None) or 11)
            for layer in past.layers
        )
        sizes = read_sizes("m", model.config, {})
        assert estimate(sizes, FP32, Workload(2, 11)).cache == 4 * held


class TestEstimate:
    def test_weights(self) -> None:
        sizes = sized(1, linear=900_000_000)
        assert FP32.weights(sizes) == 4 * 10**9
        assert BF16.weights(sizes) == 2 * 10**9
        assert EIGHT_BIT.weights(sizes) == 2 * 10**8 + 9 * 10**8
        assert FOUR_BIT.weights(sizes) == 2 * 10**8 + round(9e8 * 0.5625)

    def test_cache_and_its_windows(self) -> None:
        sizes = sized(0.001, kv=(KvLayer(100), KvLayer(100, 64)))
        assert estimate(sizes, BF16, Workload(3, 1000)).cache == 2 * 3 * 100 * (1000 + 64)
        assert estimate(sizes, FP32, Workload(3, 10)).cache == 4 * 3 * 100 * (10 + 10)
        assert estimate(sizes, FP32, Workload(3, 10, cache=False)).cache == 0

    def test_activations_grow_with_tokens_and_eager_scores_with_their_square(self) -> None:
        plain, eager = sized(0.1, n_heads=4), sized(0.1, n_heads=4, eager=True)

        def needed(sizes: Sizes, positions: int) -> int:
            found = estimate(sizes, FP32, Workload(1, positions)).activations
            assert found is not None
            return found

        logits = 100 * 8
        assert needed(plain, 200) - logits == 2 * (needed(plain, 100) - logits)
        assert needed(eager, 200) - needed(plain, 200) == 4 * 200**2 * 8

    def test_the_total_is_its_parts(self) -> None:
        need = estimate(sized(1, kv=(KvLayer(8),)), BF16, Workload())
        parts = (need.weights, need.cache, need.activations, need.readout, need.slack)
        assert need.total == sum(part or 0 for part in parts)
        assert need.to_dict()["total"] == need.total

    def test_the_readout_is_its_default_budget(self) -> None:
        default = inspect.signature(readout).parameters["budget_bytes"].default
        assert default == READOUT_BYTES

    def test_what_a_name_does_not_say_is_unknown(self) -> None:
        named = from_name("x-1b")
        assert named is not None
        need = estimate(named, BF16, Workload())
        assert (need.cache, need.activations, need.weights) == (None, None, 2 * 10**9)

    def test_quantised_files_take_what_they_hold_unless_unpacked(self) -> None:
        sizes = sized(1, scheme="fp8", packed_bytes=10**9, unpacked_on=("cpu",))
        assert format_of(torch.bfloat16, sizes, "cuda").weights(sizes) == 10**9
        assert format_of(torch.bfloat16, sizes, "cpu").weights(sizes) == 2 * 10**9

    @pytest.mark.parametrize("wrong", [{"batch": 0}, {"positions": 0}])
    def test_bad_workloads(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match="1 or more"):
            Workload(**wrong)

    @pytest.mark.parametrize(
        ("count", "text"),
        [(5, "5 B"), (2048, "2.0 KiB"), (1.5 * GIB, "1.5 GiB"), (250 * GIB, "250 GiB")],
    )
    def test_sizes_are_readable(self, count: float, text: str) -> None:
        assert show_bytes(count) == text


class TestChoice:
    def order(self, *args: object, **options: object) -> list[tuple[str, torch.dtype]]:
        tried = choose(*args, **options).tried  # type: ignore[arg-type]
        return [(candidate.where, candidate.dtype) for candidate in tried]

    def test_the_first_accelerator_with_room(self) -> None:
        assert self.order(sized(1), [card(0, 70), cpu(100)]) == [
            ("cuda:0", torch.bfloat16),
            ("cpu", torch.float32),
        ]
        assert self.order(sized(7), [card(0, 4), card(1, 40), cpu(100)], several=False) == [
            ("cuda:1", torch.bfloat16),
            ("cpu", torch.float32),
        ]

    def test_several_cards_before_the_cpu(self) -> None:
        devices = [card(0, 24), card(1, 24), cpu(200)]
        found = choose(sized(14), devices)
        assert [candidate.where for candidate in found.tried] == ["cuda:0+cuda:1", "cpu"]
        assert [candidate.where for candidate, _ in found.skipped] == ["cuda:0", "cuda:1"]
        assert all("more than is free" in why for _, why in found.skipped)
        assert self.order(sized(14), devices, several=False) == [("cpu", torch.float32)]

    def test_a_cpu_without_room_for_float32_gets_bfloat16(self) -> None:
        assert self.order(sized(7), [cpu(20)]) == [("cpu", torch.bfloat16)]
        assert self.order(sized(7), [cpu(20)], dtype=torch.float32) == []
        assert self.order(sized(7), [cpu(60)]) == [("cpu", torch.float32)]

    def test_a_cpu_runs_the_largest_models_in_bfloat16(self) -> None:
        assert self.order(sized(34), [cpu(900)]) == [("cpu", torch.bfloat16)]

    def test_comfortable_places_come_before_tight_ones(self) -> None:
        needed = placements(sized(7), [card(0, 80)], workload=Workload(cache=False))[0].needed
        tight = needed / GIB + 0.5
        assert self.order(sized(7), [card(0, tight), cpu(100)])[0][0] == "cpu"
        assert self.order(sized(7), [card(0, tight)])[0][0] == "cuda:0"
        assert RESERVE["cuda"] > 0.5 * GIB

    def test_old_cards_get_float16_and_say_why(self) -> None:
        (found,) = choose(sized(1), [card(0, 20, torch.float16)]).tried
        assert found.dtype == torch.float16 and "no bfloat16" in found.reason

    def test_what_is_missing(self) -> None:
        (found,) = placements(sized(7), [card(0, 8)], workload=Workload(cache=False))
        assert found.verdict == "no"
        assert found.missing == found.needed - 8 * GIB > 0

    def test_remedies_hold_what_they_promise(self) -> None:
        devices = [card(0, 6), cpu(12)]
        workload = Workload(cache=False)
        found = fitting_placements(sized(7), devices, workload)
        # 14 GB in bfloat16 fit nowhere, 8 bit neither; 4 bit (4.6 GiB) only on the card.
        assert [(c.where, c.estimate.format.name) for c in found] == [("cuda:0", "4 bit")]
        assert all(c.needed < c.free for c in found)

    def test_a_shorter_context_is_the_longest_that_fits(self) -> None:
        sizes = sized(1, kv=(KvLayer(40_000),) * 10)
        workload = Workload(4, 8192)
        (near,) = placements(sizes, [card(0, 5)], workload=workload)
        assert near.missing
        longest = longest_positions(near, sizes, workload)
        assert longest is not None

        def missing(positions: int) -> int:
            (again,) = placements(sizes, [card(0, 5)], workload=Workload(4, positions))
            return again.missing

        assert missing(longest) == 0 < missing(longest + 1)
        assert any(f"4 x {longest} positions" in way for way in remedies(sizes, near, [], workload))

    def test_weights_that_do_not_fit_fit_at_no_length(self) -> None:
        workload = Workload(1, 512)
        (near,) = placements(sized(70), [card(0, 5)], workload=workload)
        assert longest_positions(near, sized(70), workload) is None
