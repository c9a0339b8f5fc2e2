"""Greedy decoding with a steering edit, against Hugging Face's own ``generate``.

    python -m benchmarks generate

One process and one model: 64 new tokens after a prompt of 64, all contenders greedy, none stopping.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Report, interleave, paired_ratio, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.inputs import token_ids
from layerscope.models import Add, load

BOUND = 0.95
PLAIN, HOOK, OURS = "Hugging Face generate", "the same with a forward hook", "generate with an edit"


@torch.no_grad()
def main(*, rounds: int = 7, new_tokens: int = 64, prompt: int = 64, layer: int = 6) -> Report:
    set_threads()
    model = load(llama_12x768())
    module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
    ids = token_ids(model.d_vocab, prompt)
    rows = ids.tolist()
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    edit = Add(f"resid_post.{layer}", vector, coefficient=0.5)

    def hugging_face() -> Any:
        return module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, prompt:]

    def steer(_module: Any, _args: Any, output: Any) -> Any:
        return output + 0.5 * vector

    def hooked() -> Any:
        handle = module.model.layers[layer].register_forward_hook(steer)
        try:
            return hugging_face()
        finally:
            handle.remove()

    def ours(edits: Any = (edit,)) -> Any:
        return model.generate(rows, edits=edits, max_new_tokens=new_tokens, eos=False)

    assert ours().ids[0] == tuple(hooked().tolist())
    assert ours(()).ids[0] == tuple(hugging_face().tolist())
    timings = interleave(
        {
            PLAIN: hugging_face,
            HOOK: hooked,
            OURS: ours,
            "generate, nothing edited": lambda: ours(()),
        },
        rounds=rounds,
    )
    report = Report("generate")
    report.add(f"{new_tokens} greedy tokens", timings)
    for peer in (PLAIN, HOOK):
        speed = paired_ratio(timings, peer, OURS)
        report.claim(f"tokens/s of an edited generation / {peer}", speed, BOUND, at_most=False)
    return report
