"""The order of a capped head, norm -> unembed -> cap, on a tiny Gemma 2 in a real run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerscope
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.measures.softcap import fit_softcap
from layerscope.measures.table import LayersTable
from layerscope.models import LanguageModel
from support.tiny_models import tiny, tiny_tokenizer

PROMPTS = PromptSet("one", (Fact(key="k", prompt="long ago there was", answer="here"),))
CAP = 3.0
GAIN = 0.2  # of the final norm (1 + weight): logits reach the cap, and do not all drown in it


@pytest.fixture(scope="module")
def gemma() -> Any:
    """Return the bare module."""
    module = tiny("gemma2")
    with torch.no_grad():
        module.model.norm.weight.fill_(GAIN - 1.0)
    return module


@pytest.fixture(scope="module")
def model(gemma: Any) -> LanguageModel:
    found = layerscope.load(gemma, tokenizer=tiny_tokenizer())
    assert found.unembedding.softcap == CAP
    return found


def uncapped(gemma: Any, table: LayersTable, model: LanguageModel) -> torch.Tensor:
    """Return the logits [vocab] of the last position: final norm, then unembedding, no cap."""
    prompt = table.meta.prompts[0]
    vocabulary = {text: index for index, text in enumerate(model.token_strings())}
    special = [vocabulary[text] for text in prompt.tokens[: -len(prompt.prompt_ids)]]
    seen: list[torch.Tensor] = []
    handle = gemma.model.norm.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        gemma(input_ids=torch.tensor([[*special, *prompt.prompt_ids]]))
        handle.remove()
        return seen[0][0, -1].double() @ gemma.lm_head.weight.double().T


@pytest.mark.parametrize("norm", ["final", "next_norm"])
def test_the_last_row_caps_after_unembedding(gemma: Any, model: LanguageModel, norm: str) -> None:
    config = LayersConfig(norm_choice=norm)  # type: ignore[arg-type]
    table = execute(plan(model, PROMPTS, config)).table
    row = table.last(lens="norm", prompt_index=0).row(-1, named=True)
    head = table.meta.prompts[0].head
    assert head is not None and list(head.top_ids) == row["top_ids"]
    assert row["kl_to_final_bits"] == pytest.approx(0.0, abs=1e-6)
    z = uncapped(gemma, table, model)
    assert float(z.max()) > CAP, "logits below the cap leave no trace of it"
    p = z.softmax(-1)[row["top_ids"]].tolist()
    for probabilities in (row["top_probs"], head.top_probs):
        fit = fit_softcap(p, probabilities, softcap=CAP)
        assert fit.max_error < 1e-4
        assert fit.top_logit == pytest.approx(float(z.max()), rel=1e-3)
        # Neither another cap nor none: the bare logits are not the head.
        assert fit_softcap(p, probabilities, softcap=1.2 * CAP).max_error > 1e-2
        assert fit_softcap(p, probabilities, softcap=1000.0).max_error > 1e-2
