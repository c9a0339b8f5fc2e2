"""Patching with plain hooks on the Hugging Face model, answering one request per line.

Runs in a process of its own, with torch's and the allocator's defaults. A request is {"do", ...}:
"cells" (one forward per cell of the residual grid), "batched" (all positions of a layer in one
forward), "heads" (one forward per head), "trace" (causal tracing, one forward per cell of `rows`
noisy rows at a time). The answer holds the seconds of what was asked for, and its values.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class Hooks:
    """A model with its blocks, and hooks that put values in place."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        inner = self.model.model if hasattr(self.model, "model") else self.model.transformer
        self.blocks = list(inner.layers if hasattr(inner, "layers") else inner.h)
        self.embedding = self.model.get_input_embeddings()

    def attention(self, layer: int) -> nn.Module:
        block = self.blocks[layer]
        return block.self_attn if hasattr(block, "self_attn") else block.attn

    def heads_out(self, layer: int) -> nn.Module:
        attention: Any = self.attention(layer)
        return attention.o_proj if hasattr(attention, "o_proj") else attention.c_proj

    @contextmanager
    def reading(self, module: nn.Module, put: Callable[[Tensor], None]) -> Iterator[None]:
        """Let `put` change a copy of what a module reads."""

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            value = (args[0] if args else kwargs["hidden_states"]).clone()
            put(value)
            return (
                ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})
            )

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def inputs(self, modules: Sequence[nn.Module], ids: Tensor) -> list[Tensor]:
        """Return what modules read in a plain forward of one row."""
        kept: dict[int, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(
                lambda _module, args, kwargs, at=at: kept.update(
                    {at: (args[0] if args else kwargs["hidden_states"])[0]}
                ),
                with_kwargs=True,
            )
            for at, module in enumerate(modules)
        ]
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return [kept[at] for at in range(len(modules))]

    def outputs(self, modules: Sequence[nn.Module], ids: Tensor) -> list[Tensor]:
        """Return what modules give in a plain forward of one row."""
        kept: dict[int, Tensor] = {}
        handles = [
            module.register_forward_hook(
                lambda _module, _args, output, at=at: kept.update({at: _first(output)[0]})
            )
            for at, module in enumerate(modules)
        ]
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return [kept[at] for at in range(len(modules))]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def cells(hooks: Hooks, request: dict[str, Any]) -> list[float]:
    """One forward per cell, as a user would write it: all logits, of which the last are read."""
    clean, corrupt = (torch.tensor([request[name]]) for name in ("clean", "corrupt"))
    donor = hooks.inputs(hooks.blocks, clean)
    values: list[float] = []
    for layer, at in request["cells"]:

        def put(value: Tensor, layer: int = layer, at: int = at) -> None:
            value[0, at] = donor[layer][at]

        with hooks.reading(hooks.blocks[layer], put):
            logits = hooks.model(input_ids=corrupt, use_cache=False).logits[:, -1]
        values += _difference(logits, request)
    return values


def batched(hooks: Hooks, request: dict[str, Any]) -> list[float]:
    """All positions of a layer in one forward, of which only the last logits are made."""
    clean, corrupt = (torch.tensor([request[name]]) for name in ("clean", "corrupt"))
    donor = hooks.inputs(hooks.blocks, clean)
    places = torch.arange(clean.shape[1])
    values: list[float] = []
    for layer in request["layers"]:

        def put(value: Tensor, layer: int = layer) -> None:
            value[places, places] = donor[layer]

        with hooks.reading(hooks.blocks[layer], put):
            ids = corrupt.expand(len(places), -1)
            logits = hooks.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        values += _difference(logits, request)
    return values


def heads(hooks: Hooks, request: dict[str, Any]) -> list[float]:
    """One forward per head, patched at the last position."""
    clean, corrupt = (torch.tensor([request[name]]) for name in ("clean", "corrupt"))
    outs = [hooks.heads_out(layer) for layer in range(len(hooks.blocks))]
    donor = hooks.inputs(outs, clean)
    width = donor[0].shape[-1] // request["n_heads"]
    values: list[float] = []
    for layer, head in request["cells"]:
        part = slice(head * width, (head + 1) * width)

        def put(value: Tensor, layer: int = layer, part: slice = part) -> None:
            value[0, -1, part] = donor[layer][-1, part]

        with hooks.reading(outs[layer], put):
            logits = hooks.model(input_ids=corrupt, use_cache=False).logits[:, -1]
        values += _difference(logits, request)
    return values


def trace(hooks: Hooks, request: dict[str, Any]) -> list[float]:
    """Causal tracing: noise on the subject, clean states back; probabilities of the answer."""
    ids = torch.tensor([request["clean"]])
    places, seeds, rows = request["subject"], request["seeds"], request["rows"]
    width = hooks.embedding.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((seeds, len(places), width), generator=generator, dtype=torch.float64)
    noise = (request["noise"] * drawn).float()
    sites = {
        "state": hooks.blocks,
        "mlp": [block.mlp for block in hooks.blocks],
        "attn": [hooks.attention(layer) for layer in range(len(hooks.blocks))],
    }
    clean = {kind: hooks.outputs(modules, ids) for kind, modules in sites.items()}
    values: list[float] = []
    for kind, layers, at, begin in request["cells"]:
        some = noise[begin : begin + rows]

        def add(_module: Any, _args: Any, output: Tensor, some: Tensor = some) -> Tensor:
            output[:, places] += some
            return output

        def restore(layer: int, kind: str = kind, at: int = at) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                _first(output)[:, at] = clean[kind][layer][at]

            return hook

        handles = [hooks.embedding.register_forward_hook(add)]
        handles += [sites[kind][layer].register_forward_hook(restore(layer)) for layer in layers]
        logits = hooks.model(input_ids=ids.expand(rows, -1), use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        values += logits.double().softmax(-1)[:, request["answer"]].tolist()
    return values


def _difference(logits: Tensor, request: dict[str, Any]) -> list[float]:
    return (logits[:, request["answer"]] - logits[:, request["foil"]]).tolist()


JOBS = {"cells": cells, "batched": batched, "heads": heads, "trace": trace}


def main() -> None:
    torch.set_num_threads(2)
    hooks = Hooks(sys.argv[1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        with torch.no_grad():
            values = JOBS[request["do"]](hooks, request)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "values": values}), flush=True)


if __name__ == "__main__":
    main()
