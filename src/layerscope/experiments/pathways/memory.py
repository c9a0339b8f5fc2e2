"""Peak memory of a stage, and what a run is expected to take."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from layerscope.allocator import peak_memory_bytes
from layerscope.experiments.pathways.audit import causal_records
from layerscope.experiments.pathways.targets import group_size
from layerscope.experiments.pathways.workspace import Workspace
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.pathways.pullback import GRAPH_BYTES
from layerscope.features.staging import plan_stages
from layerscope.models.batched_gradients import KEPT
from layerscope.models.devices import parse_device, place
from layerscope.models.memory import Sizes

_FIRST_USE = 185e6  # of a first run: 105 MB of libraries' pages, and what they allocate
_AROUND = 2**16  # bytes that Linux maps around a page of a file that is read
_ACTIVE = 64  # features of a token, where the dictionary's file does not say
_SWEPT = 2**28  # bytes of one backward pass of a sweep
_TRACED = 2**30  # bytes of one backward pass that traces input tokens
_REPLAYED = 8192  # tokens of one pass of a replay
_ENCODED = 4096  # tokens of one batch of the tokens stage, with logits
_TEXTS = 64  # read at once in the tokens stage, few of them longer than a prompt


def begin_stage(device: str | None) -> None:
    """Begin a stage's own peak: earlier stages no longer count, where the system can tell."""
    cuda = _cuda(device)
    if cuda is not None:
        torch.cuda.reset_peak_memory_stats(cuda)
    with suppress(OSError):  # only Linux has it, and not every container lets it be written
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str | None) -> int | None:
    """Return the peak since `begin_stage`, read before anything is reset.

    On CUDA that of the device; else the resident set of this process.
    """
    cuda = _cuda(device)
    if cuda is not None:
        return int(torch.cuda.max_memory_allocated(cuda))
    return peak_memory_bytes()


def plan(work: Workspace) -> dict[str, Any]:
    """Return what a run needs, from configuration, headers and checkpoints; nothing is computed.

    Bytes are those of the device: on CUDA what torch allocates there, else the resident set of
    this process, in which mapped pages of the dictionaries' files count.
    """
    from layerscope.models.backends.huggingface.lookup import find_sizes

    config = work.config
    sizes = find_sizes(config.model)
    placed = place(config.device, config.dtype)
    cuda = placed.device.type == "cuda"
    used = list(work.dictionaries)
    staging = plan_stages(work.dictionaries, decoder=False)
    tokens = _longest(work)
    n_layers = int(sizes.n_layers or 1)
    targets = config.top_n_per_layer * len(used)
    prompts = _n_prompts(work)
    model_bytes = sizes.parameters * placed.dtype.itemsize
    phases = _phases(work, sizes, placed.dtype.itemsize, tokens, targets)
    held = {
        "model": 0 if work.has_model else model_bytes,
        "state": _state(work, tokens, n_layers, placed.dtype.itemsize),
        "before": torch.cuda.memory_allocated(placed.device) if cuda else _resident(),
        "mapped": 0 if cuda else sum(_mapped(each, tokens) for each in used),
    }
    # Dictionaries are staged before the first sweep of a prompt, not during it; but a process on
    # the CPU keeps what it freed.
    most = max(phases.values())
    most = max(staging.peak_bytes, most) if cuda else staging.peak_bytes + most
    peak = sum(held.values()) + most
    block = (sizes.parameters - (sizes.embedding or 0) - (sizes.unembedding or 0)) / n_layers
    flops = prompts * tokens * (2 * n_layers * block) * (1 + targets / 2)
    return {
        "staging": staging.line(),
        "dictionary_bytes_read": staging.total_bytes * prompts * 2,
        "dictionary_bytes_held": staging.peak_bytes,
        "model_bytes": model_bytes,
        "held_bytes": {name: int(value) for name, value in held.items()},
        "phase_bytes": {name: int(value) for name, value in phases.items()},
        "peak_bytes": int(peak),
        "memory_limit_bytes": int(config.memory_limit_gb * 1e9),
        "fits": peak < config.memory_limit_gb * 1e9,
        "prompts": prompts,
        "tokens_per_prompt": tokens,
        "targets": targets,
        "targets_per_chunk": min(targets, group_size(work, tokens)),
        "edges_at_most": targets * prompts * config.top_k_pathways,
        "flops": flops,
        "seconds_by_rate": {
            f"{rate / 1e12:g} TFLOP/s": flops / rate for rate in (1e11, 1e13, 4e14)
        },
    }


def _phases(
    work: Workspace, sizes: Sizes, item: int, tokens: int, targets: int
) -> dict[str, float]:
    """Return what every stage holds beside the model and the prompt's state."""
    d_model, d_mlp = int(sizes.d_model or 0), int(sizes.d_mlp or 0)
    group = min(targets, group_size(work, tokens))
    # At the worst moment of a block: stream and norm in float32; queries, keys, values and what
    # they are turned into, or, when these are gone, three tensors of the MLP.
    block = 2 * 4 * d_model + item * max(8 * d_model, 3 * d_mlp)
    texts = min(_ENCODED, _TEXTS * tokens)
    point = tokens * _blocks_traced(work) * KEPT * d_model * item
    traced = point * max(1, min(32, _TRACED // point)) if point else 0
    logits = int(sizes.d_vocab or 0) * item
    return {
        "discover": 2 * 4 * group * tokens * d_model
        + min(_SWEPT, 4 * group * tokens * 12 * d_model) * item / 4
        + min(GRAPH_BYTES, tokens * int(sizes.n_layers or 1) * KEPT * d_model * item),
        "replay": min(_REPLAYED, 16 * targets * tokens) * (block + 2 * d_model * item),
        "tokens": max(texts * (logits + len(work.dictionaries) * d_model * item + block), traced),
    }


def _state(work: Workspace, tokens: int, n_layers: int, item: int) -> float:
    """Return the bytes of a prompt's state: residuals, keys and values, write directions."""
    directions = sum(_distinct(each, tokens) * each.d_out * 4 for each in work.dictionaries)
    width = next(iter(work.dictionaries)).d_in
    return directions + 3 * (n_layers + 1) * tokens * width * item


def _distinct(dictionary: SparseDictionary, tokens: int) -> float:
    """Return how many features are active on a prompt.

    As if every token drew its features among all: some are active at several.
    """
    active = float(dictionary.facts.get("expected_l0") or _ACTIVE)
    n = dictionary.n_features
    return n * (1 - (1 - min(1.0, active / n)) ** tokens)


def _mapped(dictionary: SparseDictionary, tokens: int) -> float:
    """Return the bytes of a dictionary's file that stay mapped.

    All of the encoder, which is read whole; of the decoder what lies around the rows of active
    features, as if these were strewn over it.
    """
    half = _stored(dictionary.facts.get("path")) / 2
    if not half:
        return 0.0
    return half * (2 - math.exp(-_distinct(dictionary, tokens) * _AROUND / half))


def _blocks_traced(work: Workspace) -> int:
    """Return through how many blocks input tokens are traced at most.

    They are those below the features of the largest effects. Where no checkpoint names a causal
    feature, these could be of any layer.
    """
    known = set(work.dictionaries.layers)
    causal = [record for record in causal_records(work.config) if record.layer in known]
    ranked = sorted(causal, key=lambda record: (-abs(record.cohen_d), record.layer))
    layers = [record.layer for record in ranked] or [max(known)]
    return max((layer + 1 for layer in layers[: work.config.drivers]), default=0)


def _stored(path: Any) -> int:
    """Return the bytes of a dictionary's files."""
    where = Path(str(path)) if path else None
    if where is None or not where.exists():
        return 0
    files = [where] if where.is_file() else list(where.iterdir())
    return sum(file.stat().st_size for file in files if file.is_file())


def _resident() -> float:
    """Return what this process holds with everything imported and used once."""
    import psutil

    return psutil.Process().memory_info().rss + _FIRST_USE


def _n_prompts(work: Workspace) -> int:
    from layerscope.experiments.pathways.workspace import read_prompts

    return len(read_prompts(work.prompts_path)[: work.config.n_prompts])


def _longest(work: Workspace) -> int:
    from layerscope.experiments.pathways.select import sample_prompts

    return max(entry["n_tokens"] for entry in sample_prompts(work, work.config)["prompts"])


def _cuda(device: str | None) -> torch.device | None:
    """Return the CUDA device that is meant, None where it is another kind."""
    meant = parse_device(device)
    return meant if meant.type == "cuda" else None
