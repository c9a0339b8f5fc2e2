"""A cap leaves its trace in probabilities: constructed rows, then those of Gemma 2 9B."""

from __future__ import annotations

import numpy as np
import pytest

from golden.published_case import case
from layerscope.errors import TableError
from layerscope.measures.softcap import cap, fit_softcap

Z = np.random.default_rng(3).normal(size=200) * 20


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max())
    return p / p.sum()


@pytest.mark.parametrize("shift", [0.0, 12.0, -40.0])
def test_a_cap_leaves_its_trace_in_probabilities(shift: float) -> None:
    z = Z + shift
    top = np.argsort(-z)[:20]
    p, q = softmax(z)[top].tolist(), softmax(cap(z, 30.0))[top].tolist()
    found = fit_softcap(p, q, softcap=30.0)
    assert found.top_logit == pytest.approx(z.max(), abs=1e-6)
    assert found.max_error < 1e-8
    assert found.tokens == 20
    # Neither another cap, nor a head that does not cap, fits.
    assert fit_softcap(p, q, softcap=50.0).max_error > 0.1
    assert fit_softcap(p, softmax(z)[top].tolist(), softcap=30.0).max_error > 0.1


def test_a_cap_before_the_softmax_scale_is_another_cap() -> None:
    top = np.argsort(-Z)[:20]
    scaled_first = softmax(cap(0.25 * Z, 30.0))[top].tolist()
    scaled_last = softmax(0.25 * cap(Z, 30.0))[top].tolist()
    p = softmax(0.25 * Z)[top].tolist()
    assert fit_softcap(p, scaled_first, softcap=30.0).max_error < 1e-8
    assert fit_softcap(p, scaled_last, softcap=30.0).max_error > 1e-3


def test_probabilities_that_prove_nothing() -> None:
    for bad in ([0.5, 0.5], [0.5, 0.5, 0.0]):
        with pytest.raises(TableError, match="same three tokens"):
            fit_softcap(bad, bad, softcap=30.0)
    with pytest.raises(TableError, match="softcap is 0"):
        fit_softcap([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], softcap=0)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("model", "softcap", "fits"),
    [
        ("gemma-2-9b", 30.0, True),
        ("gemma-2-9b", 29.0, False),
        ("gemma-2-9b", 31.0, False),
        ("gemma-2-9b", 1000.0, False),
        ("Meta-Llama-3-8B", 30.0, False),
    ],
)
def test_the_published_rows_of_a_capped_head(model: str, softcap: float, fits: bool) -> None:
    """Row n of the publisher's lens left the cap out, the model's own prediction has it."""
    found = case(model)
    n = found.table.meta.n_layers
    row = found.table.last(lens="norm", prompt_index=0).row(n, named=True)
    head = dict(found.published["final_prediction"]["topk"])
    shared = [
        (p, head[token])
        for token, p in zip(row["top_tokens"], row["top_probs"], strict=True)
        if token in head
    ]
    assert len(shared) == 5
    fit = fit_softcap([p for p, _ in shared], [q for _, q in shared], softcap=softcap)
    assert (fit.max_error < 1e-4) == fits
    if fits:
        assert fit.top_logit == pytest.approx(49.14, abs=0.005)
        assert fit.max_error < 2e-6
