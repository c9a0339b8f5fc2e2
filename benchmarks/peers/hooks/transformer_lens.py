"""TransformerLens 4: the bridge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.peers.hooks.job import (
    NEW_TOKENS,
    Input,
    Job,
    Library,
    Outcome,
    load_reference,
    tensors_in,
)


def jobs(model: Any, given: Input) -> dict[str, Job]:
    ids = given.ids
    name = f"blocks.{given.layer}.hook_resid_post"
    blocks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]

    def wanted(hook: str) -> bool:
        return hook.endswith("hook_resid_post") or hook == "blocks.0.hook_resid_pre"

    def steer(value: Tensor, hook: Any) -> Tensor:
        return value + given.vector

    def read(value: tuple[Tensor, Any]) -> Outcome:
        logits, cache = value
        return Outcome(logits, [cache[block] for block in blocks], tensors_in(dict(cache.items())))

    def decode() -> Tensor:
        with model.hooks(fwd_hooks=[(name, steer)]):
            return model.generate(
                ids,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                return_type="tokens",
            )

    return {
        "idle": Job(lambda: model(ids), Outcome),
        "residuals": Job(lambda: model.run_with_cache(ids, names_filter=wanted), read),
        "every site": Job(lambda: model.run_with_cache(ids), read),
        "edit": Job(lambda: model.run_with_hooks(ids, fwd_hooks=[(name, steer)]), Outcome),
        "decode": Job(decode, lambda value: Outcome(tokens=value[0, ids.shape[1] :].tolist())),
    }


def build(folder: str) -> Library:
    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    return Library(load_reference(folder), model, lambda given: jobs(model, given))
