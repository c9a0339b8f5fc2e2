"""Gradients of many cotangents at once are those of one after the other, in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import layerscope
from layerscope.models import Add, LanguageModel, Replace, Start
from layerscope.models.batched_gradients import BatchedGradients, derivatives, gate, pull_back
from support.tiny_models import FAMILIES, tiny, tiny_tokenizer

IDS = [[1, 17, 40, 5, 300, 251, 8, 8, 2]]


def load(family: str) -> LanguageModel:
    return layerscope.load(tiny(family), tokenizer=tiny_tokenizer())


def through_a_block(model: LanguageModel, gradients: Any) -> tuple[Tensor, Tensor]:
    """Return the last residual, and the leaf before the last block that it was made from."""
    last = model.n_layers - 1
    below = model.run(IDS, capture=f"resid_pre.{last}", logits=None)[f"resid_pre.{last}"]
    below = below.detach().clone().requires_grad_(True)
    run = model.run(
        IDS,
        start=Start(last, below),
        capture=f"resid_post.{last}",
        edits=[Add(f"mlp_out.{last}", 0.1 * torch.ones(model.d_model))],
        logits=None,
        stop_after=last,
        gradients=gradients,
    )
    return run[f"resid_post.{last}"], below


def names_in(graph: Any) -> Iterator[str]:
    seen: set[Any] = set()
    waiting = [graph]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield type(node).__name__
        waiting += [following for following, _ in node.next_functions]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_the_plain_gradients(family: str) -> None:
    model = load(family)
    above, below = through_a_block(model, True)
    cotangents = torch.randn((5, *above.shape), generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [torch.autograd.grad(above, below, each, retain_graph=True)[0] for each in cotangents]
    )
    batched, leaf = through_a_block(model, "batched")
    assert (batched - above).abs().max() <= 1e-5 * above.abs().max()
    (found,) = pull_back(batched, [leaf], cotangents)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    # The same graph also serves one.
    (alone,) = torch.autograd.grad(batched, leaf, cotangents[3])
    assert (alone - expected[3]).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.skipif(derivatives() is None, reason="no numba")
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"_RmsNormBackward", "_RotateBackward", "_AttentionBackward", "_GateBackward"}),
        ("gpt2", {"_AttentionBackward", "_SlopesBackward"}),
    ],
)
def test_what_has_a_backward_pass_of_its_own_uses_it(family: str, expected: set[str]) -> None:
    model = load(family)
    assert expected <= set(names_in(through_a_block(model, "batched")[0].grad_fn))
    assert not expected & set(names_in(through_a_block(model, True)[0].grad_fn))


@pytest.mark.parametrize(
    "site", ["attn.L.q_pre", "attn.L.k_pre", "attn.L.q", "mlp.L.pre", "mlp.L.up"]
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_an_edit_makes_constant_leaves_the_others_their_gradient(
    site: str, trained: bool
) -> None:
    model = load("llama")
    last = model.n_layers - 1
    site = site.replace("L", str(last))
    seen = model.run(IDS, capture=[site, f"resid_pre.{last}"], logits=None)
    model.backend.model.requires_grad_(trained)  # type: ignore[attr-defined] # pyright: ignore
    found: list[Tensor] = []
    for gradients in (True, "batched"):
        below = seen[f"resid_pre.{last}"].detach().clone().requires_grad_(True)
        above = model.run(
            IDS,
            start=Start(last, below),
            capture=f"resid_post.{last}",
            edits=[Replace(site, seen[site].detach())],
            logits=None,
            stop_after=last,
            gradients=gradients,  # type: ignore[arg-type] # pyright: ignore
        )[f"resid_post.{last}"]
        found += torch.autograd.grad(above, below, torch.ones_like(above).cumsum(-1))
    assert (found[0] - found[1]).abs().max() <= 2e-5 * found[0].abs().max()


def test_nothing_is_left_behind() -> None:
    model = load("llama")
    before = through_a_block(model, True)[0]
    through_a_block(model, "batched")
    assert torch.equal(through_a_block(model, True)[0], before)


def test_without_compiled_loops_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerscope.models import batched_gradients
    from layerscope.models.backends.huggingface import one_operation

    model = load("llama")
    above, leaf = through_a_block(model, "batched")
    cotangents = torch.randn((5, *above.shape))
    (expected,) = pull_back(above, [leaf], cotangents)
    monkeypatch.setattr(batched_gradients, "derivatives", lambda: None)
    monkeypatch.setattr(one_operation, "_loops", lambda: None)
    above, leaf = through_a_block(model, "batched")
    assert not {"_RmsNormBackward", "_AttentionBackward"} & set(names_in(above.grad_fn))
    (found,) = pull_back(above, [leaf], cotangents)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "function",
    [
        functional.silu,
        functional.gelu,
        partial(functional.gelu, approximate="tanh"),
        functional.softplus,
        partial(functional.elu, alpha=0.7),
        torch.tanh,
    ],
)
def test_slopes_had_in_advance_are_those_of_the_function(
    function: Callable[[Tensor], Tensor],
) -> None:
    values = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_(True)
    cotangents = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    expected = function(values)
    with BatchedGradients():
        found = function(values)
    assert torch.equal(found, expected)
    assert "Slopes" in type(found.grad_fn).__name__
    slopes = torch.autograd.grad(expected.sum(), values)[0]
    (pulled,) = pull_back(found, [values], cotangents)
    torch.testing.assert_close(pulled, cotangents * slopes, rtol=1e-12, atol=1e-12)


def test_a_gate_passes_both_gradients() -> None:
    gates, values = torch.randn(2, 12, dtype=torch.float64).unbind()
    gates, values = gates.clone().requires_grad_(True), values.clone().requires_grad_(True)
    cotangents = torch.randn(5, 12).double()
    made, plain = gate(functional.silu, gates, values), functional.silu(gates) * values
    assert torch.equal(made, plain)
    found = pull_back(made, [gates, values], cotangents)
    expected = pull_back(plain, [gates, values], cotangents)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
