"""Peak memory of a stage, and what a run is expected to take."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from layerscope.experiments import provenance
from layerscope.experiments.pathways.targets import GROUP
from layerscope.experiments.pathways.workspace import Workspace
from layerscope.features.staging import plan_stages

_BLOCK_TENSORS = 12  # of d_model width per token that a block's backward pass keeps
_FIRST_USE = 150e6  # what torch and transformers take when first used, beyond being imported
_REPLAYED = 8192  # tokens of one pass of a replay
_ENCODED = 4096  # tokens of one batch of the tokens stage, with logits


def begin_stage(device: str | None) -> None:
    """Begin a stage's own peak: earlier stages no longer count, where the system can tell."""
    if _on_cuda(device):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux has it, and not every container lets it be written
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str | None) -> int | None:
    """Return the peak since `begin_stage`, read before anything is reset.

    On CUDA that of the device; else the resident set of this process.
    """
    if _on_cuda(device):
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        with suppress(OSError, ValueError, IndexError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return provenance.peak_memory_bytes()


def plan(work: Workspace) -> dict[str, Any]:
    """Return what a run needs, from configuration files and headers alone; nothing is computed."""
    from transformers import AutoConfig

    config = work.config
    shape: Any = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    d_model, n_layers = int(shape.hidden_size), int(shape.num_hidden_layers)
    staging = plan_stages(work.dictionaries)
    width = 2 if config.dtype in ("bfloat16", "float16") else 4
    block = 4 * d_model**2 + 3 * d_model * int(getattr(shape, "intermediate_size", 4 * d_model))
    parameters = n_layers * block + 2 * int(shape.vocab_size) * d_model
    tokens = _longest(work)
    per_target = tokens * d_model * 4
    group = config.batch_size or GROUP
    n_layers_used = len(work.dictionaries.layers)
    targets = config.top_n_per_layer * n_layers_used
    prompts = _n_prompts(work)
    flops = prompts * tokens * (2 * n_layers * block) * (1 + targets / 2)
    inner = int(getattr(shape, "intermediate_size", 4 * d_model))
    heads = int(getattr(shape, "num_attention_heads", 1))
    cached = d_model * int(getattr(shape, "num_key_value_heads", None) or heads) // heads
    phases = {
        "discover": per_target * (2 * group + n_layers + 1 + _BLOCK_TENSORS * min(group, 32)),
        "replay": _REPLAYED * (4 * d_model + 3 * inner + 2 * n_layers * cached) * 4,
        "tokens": _ENCODED * (2 * int(shape.vocab_size) + n_layers_used * d_model) * 4,
    }
    model_bytes = parameters * width
    peak = _base() + model_bytes + staging.peak_bytes + max(phases.values())
    return {
        "staging": staging.line(),
        "dictionary_bytes_read": staging.total_bytes * prompts * 2,
        "dictionary_bytes_held": staging.peak_bytes,
        "model_bytes": model_bytes,
        "phase_bytes": phases,
        "peak_bytes": int(peak),
        "memory_limit_bytes": int(config.memory_limit_gb * 1e9),
        "fits": peak < config.memory_limit_gb * 1e9,
        "prompts": prompts,
        "tokens_per_prompt": tokens,
        "targets": targets,
        "edges_at_most": targets * prompts * config.top_k_pathways,
        "flops": flops,
        "seconds_by_rate": {
            f"{rate / 1e12:g} TFLOP/s": flops / rate for rate in (1e11, 1e13, 4e14)
        },
    }


def _base() -> float:
    """Return what this process holds with everything imported, and no weight loaded."""
    import psutil

    return psutil.Process().memory_info().rss + _FIRST_USE


def _n_prompts(work: Workspace) -> int:
    from layerscope.experiments.pathways.workspace import read_prompts

    return len(read_prompts(work.prompts_path)[: work.config.n_prompts])


def _longest(work: Workspace) -> int:
    from layerscope.experiments.pathways.select import sample_prompts

    return max(entry["n_tokens"] for entry in sample_prompts(work, work.config)["prompts"])


def _on_cuda(device: str | None) -> bool:
    return torch.cuda.is_available() and (device or "auto").startswith(("cuda", "auto"))
