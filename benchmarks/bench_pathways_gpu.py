"""The pathways pipeline on a model of the 8B shape: end to end, with time and memory by stage.

    python -m benchmarks.bench_pathways_gpu            # Llama-3.1-8B's shape, on the first GPU
    python -m benchmarks.bench_pathways_gpu --tiny     # the same program on anything, in seconds

Random weights are made on the device, and random JumpReLU dictionaries are written to the disk,
about 50 features active per token; nothing is downloaded. Then the pipeline runs as a user's does:
audit, select, prototype, discover, replay, tokens, integrate. The goal is 5 minutes and 28 GB.

The full shape needs a device of 28 GB, 17 GB of free disk (``--folder`` says where) and 16 GB of
memory for the page cache, or the dictionaries are read from the disk again by the second stage.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from benchmarks.harness import RESULTS, Report, Timing, peak_rss_bytes
from layerscope.experiments.pathways import NAMES, Workspace, plan, read_config, run_stage
from layerscope.experiments.pathways.config import CONDITIONS
from layerscope.experiments.pathways.workspace import DISCOVERED, EDGES, RUN
from layerscope.features import Matrix, SparseDictionary, write_dictionary
from layerscope.features.architectures import JumpRelu
from layerscope.models import LanguageModel, Site, load
from layerscope.models.devices import parse_device

SECONDS, GIGABYTES = 300.0, 28.0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, its dictionaries and the job."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    features: int
    active: int
    targets_per_layer: int
    edges: int
    tokens: int
    trials: int
    permutations: int


FULL = Shape(32, 4096, 32, 8, 14_336, 128_256, 32_768, 50, 50, 25, 120, 20, 10_000)
TINY = Shape(4, 64, 4, 2, 128, 512, 256, 8, 4, 5, 12, 4, 200)


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the program")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where dictionaries and run go (kept)")
    parser.add_argument("--tokens", type=int, help="of the prompt")
    parser.add_argument("--batch", type=int, help="targets of one chunk; default: by memory")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(
            TINY if options.tiny else FULL,
            parse_device(options.device),
            options.folder or Path(temporary),
            name="pathways_gpu_tiny" if options.tiny else "pathways_gpu",
            tokens=options.tokens,
            batch=options.batch,
        )
    report.show()
    if options.out or not options.tiny:
        print(f"written to {report.save(options.out or RESULTS)}")
    return report


def measure(
    shape: Shape,
    device: torch.device,
    folder: Path,
    *,
    name: str,
    tokens: int | None = None,
    batch: int | None = None,
) -> Report:
    report = Report(name)
    started = time.perf_counter()
    model = random_model(shape, device, folder / "model")
    words = prompt_words(shape, tokens or shape.tokens)
    chosen = write_dictionaries(model, shape, words, folder / "dictionaries")
    write_data(shape, chosen, words, folder / "data")
    _settle(device)
    report.add("making model, dictionaries and data", _once(time.perf_counter() - started))
    given: dict[str, Any] = {"device": str(device), "dtype": "bfloat16", "batch_size": batch}
    config = read_config(
        None,
        data=str(folder / "data"),
        model=str(folder / "model"),
        dictionaries=str(folder / "dictionaries"),
        top_n_per_layer=shape.targets_per_layer,
        top_k_pathways=shape.edges,
        permutations=shape.permutations,
        memory_limit_gb=GIGABYTES,
        **given,
    )
    work = Workspace(config, folder / "run", model=model)
    planned = plan(work)
    title = device_name(device)
    total, peaks = 0.0, {}
    for stage in NAMES:
        _settle(device)
        begun = time.perf_counter()
        done = run_stage(work, stage)
        seconds = time.perf_counter() - begun
        total += seconds
        peaks[stage] = done.peak_memory_bytes or 0
        report.add(stage, _once(seconds), peak_bytes=peaks[stage], device=title)
        if done.record.exit_code > 1:
            raise SystemExit(f"{stage} failed: {'; '.join(done.record.notes)}")
    report.add("end to end", _once(total), device=title, host_peak_bytes=peak_rss_bytes())
    peak = max(peaks.values())
    full = shape is FULL
    report.claim("seconds, end to end", total, SECONDS if full else 60.0)
    report.claim(f"peak GB on {device.type}", peak / 1e9, GIGABYTES)
    if full:
        report.claim("planned / measured peak, off by", abs(planned["peak_bytes"] / peak - 1), 0.15)
    report.remarks += [f"device: {title}", *remarks(work, planned, peaks)]
    return report


def random_model(shape: Shape, device: torch.device, folder: Path) -> LanguageModel:
    """Random weights, made on the device; the folder gets configuration and tokenizer alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8_192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with device:
        module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "norm" in key:
                parameter.add_(0.15 * torch.randn_like(parameter))
            elif "q_proj" in key:  # heads that look at few tokens, as trained ones do
                parameter.mul_(6.0)
            elif "o_proj" in key:
                parameter.mul_(3.0)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words |= {f"w{number}": number for number in range(3, shape.vocabulary)}
    table = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(module.eval().requires_grad_(False), tokenizer=tokenizer)


def prompt_words(shape: Shape, tokens: int) -> str:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.vocabulary, (tokens - 1,), generator=generator)  # and one BOS
    return " ".join(f"w{number}" for number in ids.tolist())


@torch.no_grad()
def write_dictionaries(
    model: LanguageModel, shape: Shape, prompt: str, folder: Path
) -> dict[int, list[int]]:
    """Write one dictionary per block but the first; return the strongest features at the end."""
    chosen: dict[int, list[int]] = {}
    generator = torch.Generator(model.device).manual_seed(2)
    n, width = shape.features, shape.width
    for layer in range(1, model.n_layers):
        site = f"resid_post.{layer}"
        stream = model.run(prompt, capture=site, stop_after=layer, logits=None)[site][0].float()
        encoder, decoder = (
            torch.randn(n, width, generator=generator, device=model.device) / width**0.5
            for _ in range(2)
        )
        pre = stream @ encoder.bfloat16().float().T
        kept = shape.active * len(stream)
        threshold = float(pre.flatten().topk(kept).values[-1])
        chosen[layer] = pre[-1].topk(shape.targets_per_layer).indices.tolist()
        made = SparseDictionary(
            reads=Site("resid_post", layer),
            writes=(Site("resid_post", layer),),
            encoder=Matrix.of("encoder", encoder.bfloat16()),
            decoders=(Matrix.of("decoder", decoder.bfloat16()),),
            gate=JumpRelu(torch.full((n,), max(threshold, 1e-6))),
            bias=torch.zeros(n),
            decoder_bias=torch.zeros(width),
        )
        write_dictionary(made, folder / f"layer_{layer}", figures={"l0": shape.active})
    return chosen


def write_data(shape: Shape, chosen: dict[int, list[int]], prompt: str, folder: Path) -> None:
    """Write what the audit reads: verdicts on the targets, responses, and the prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [
        {
            "feature": f"L{layer}-{feature}",
            "layer": layer,
            "feature_id": feature,
            "cohen_d": 2.0 - rank / len(features),
            "is_causal": True,
            "is_causal_safe": True,
            "is_causal_risky": False,
        }
        for layer, features in chosen.items()
        for rank, feature in enumerate(features)
    ]
    checkpoint = {"timestamp": "2026-01-01T00:00:00", "results": results}
    (folder / "checkpoint_L1_31_0_20260101_000000.json").write_text(json.dumps(checkpoint))
    generator = torch.Generator().manual_seed(3)
    shared = torch.randint(3, shape.vocabulary, (64, 16), generator=generator).tolist()
    with (folder / "responses_L1_31_0_20260101_000000.json").open("w") as file:
        file.write("[")
        for number, (each, condition, trial) in enumerate(
            (each, condition, trial)
            for each in results
            for condition in CONDITIONS
            for trial in range(shape.trials)
        ):
            words = " ".join(f"w{word}" for word in shared[number % 64])
            text = f"w{3 + number % (shape.vocabulary - 3)} {words}"
            record = {
                "feature": each["feature"],
                "condition": condition,
                "trial": trial,
                "response": text,
                "is_valid": True,
            }
            file.write(("," if number else "") + json.dumps(record))
        file.write("]")
    prompts = {"prompts": [{"id": "decision", "text": prompt, "origin": "random words"}]}
    (folder / "prompts.json").write_text(json.dumps(prompts))


def remarks(work: Workspace, planned: dict[str, Any], peaks: dict[str, int]) -> list[str]:
    """Say what the job turned out to be: random weights decide how far edges reach."""
    found = pl.read_parquet(work.path(DISCOVERED))
    sources = found.select("source_layer", "source_id", "source_position").n_unique()
    last = float((found["source_position"] == found["target_position"]).mean() or 0.0)  # type: ignore[arg-type]
    size = sum(file.stat().st_size for file in work.path(EDGES).rglob("*.parquet"))
    stages = json.loads(work.path(RUN).read_text())["stages"]
    read = stages["discover"]["summary"]["bytes_read"]
    phases = {name: round(value / 1e9, 2) for name, value in planned["phase_bytes"].items()}
    return [
        f"{found.height} edges from {sources} sources, {last:.0%} of them at the target's token",
        f"verdicts: {stages['replay']['summary']['verdicts']}",
        f"peak of the host's memory: {peak_rss_bytes() / 1e9:.2f} GB, mapped files included",
        f"dictionaries read for discovery: {read / 1e9:.2f} GB; edges on the disk: "
        f"{size / 1e6:.2f} MB",
        f"planned peak {planned['peak_bytes'] / 1e9:.2f} GB, measured "
        f"{max(peaks.values()) / 1e9:.2f} GB; planned by phase, in GB: {phases}",
    ]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {memory / 1e9:.0f} GB"
    return f"{device.type} ({platform.machine()})"


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(seconds: float) -> dict[str, Timing]:
    return {"layerscope": Timing((seconds,))}


if __name__ == "__main__":
    main()
