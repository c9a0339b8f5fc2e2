"""The built-in suite's 11 passes on the embedded model, against the loop one would write by hand.

    python -m benchmarks layers

The loop runs one forward pass per prompt and unembeds each layer for itself, with entropy, KL and
top-k at the last position only; ours reads every position through two lenses, with all statistics,
and measures the table.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Report, interleave, paired_ratio, set_threads
from layerscope.demo import model_path
from layerscope.experiments.layers import PromptSet, analyze
from layerscope.models import load

LIMIT_S = 10.0


def main(*, rounds: int = 7) -> Report:
    set_threads()
    model = load(model_path())
    module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
    passes = PromptSet.builtin().passes()

    @torch.no_grad()
    def by_hand() -> None:
        for entry in passes:
            ids = torch.tensor([model.tokenize([entry.text]).row_ids(0)])
            out = module(ids, use_cache=False, output_hidden_states=True)
            final = out.logits[0, -1].log_softmax(-1)
            for hidden in out.hidden_states:
                log_probs = module.lm_head(module.model.norm(hidden[0, -1])).log_softmax(-1)
                probs = log_probs.exp()
                _ = -(probs * log_probs).sum(), (probs * (log_probs - final)).sum()
                _ = probs.topk(20)

    timings = interleave(
        {"by hand, last position": by_hand, "layerscope.analyze": lambda: analyze(model)},
        rounds=rounds,
    )
    report = Report("layers")
    report.add("11 passes, embedded model", timings)
    ours = timings["layerscope.analyze"].median
    report.claim("seconds for the suite's 11 passes after load", ours, LIMIT_S)
    ratio = paired_ratio(timings, "layerscope.analyze", "by hand, last position")
    report.rows[-1]["paired_ratio"] = ratio
    return report
