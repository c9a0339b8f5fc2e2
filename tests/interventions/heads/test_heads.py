"""The attention-head zoo: planted heads, the embedded model's heads, and proof by ablation."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.demo import model_path
from layerscope.errors import ConfigError
from layerscope.interventions.direct import direct_logit_attribution
from layerscope.interventions.heads import (
    ablate_heads,
    copying_logprob,
    direct_scores,
    drops_alone,
    head_scores,
    repeated_tokens,
)
from layerscope.interventions.heads.copying import output_matrices
from layerscope.interventions.heads.sequences import parts_of
from layerscope.models import ResampleAblate, TokenBatch, ZeroAblate
from support.loaded import loaded
from support.toy_induction import LENGTH, PREVIOUS, TOKEN, induction_toy

FAMILIES = ("llama", "gpt2", "gemma2", "phi", "gpt_neox", "qwen3", "olmo2", "mixtral")


@pytest.fixture(scope="module")
def demo():
    return layerscope.load(model_path(), device="cpu", dtype="float32")


def test_sequences_repeat_and_are_seeded(demo) -> None:
    first, again = repeated_tokens(demo, seed=3), repeated_tokens(demo, seed=3)
    assert torch.equal(first.batch.ids, again.batch.ids)
    assert not torch.equal(first.batch.ids, repeated_tokens(demo, seed=4).batch.ids)
    assert first.front == 1 and bool((first.batch.ids[:, 0] == demo.tokenizer.bos_token_id).all())
    half = first.batch.ids[:, 1:26]
    assert torch.equal(half, first.batch.ids[:, 26:])
    special = torch.tensor(demo.tokenizer.all_special_ids)
    assert not torch.isin(half, special).any()
    assert all(len(set(row.tolist())) == 25 for row in half)


def test_sequences_that_cannot_be_are_refused(demo) -> None:
    with pytest.raises(ConfigError, match="use a length of at most 127"):
        repeated_tokens(demo, length=128)
    with pytest.raises(ConfigError, match="at least one sequence of two tokens"):
        repeated_tokens(demo, length=1)


def test_planted_heads_are_named() -> None:
    toy = induction_toy(20.0)
    repeated = repeated_tokens(toy.model, length=LENGTH // 2, n_sequences=6)
    scores = head_scores(toy.model, repeated)
    assert scores.top("previous_token", 1) == [(0, 0)]
    assert scores.top("induction", 1) == [(1, 0)]
    # The first token has none before it, so head 0.0 writes that token itself at its own place, and
    # of the three places looked from, the first one finds two alike.
    assert float(scores.values["induction"][1, 0]) == pytest.approx(5 / 6, abs=1e-4)
    assert float(scores.values["previous_token"][0, 0]) > 0.99
    assert scores.above("induction", 0.8) == [(1, 0)]
    # Head 1.0 copies what it reads; head 0.0 writes it where the unembedding does not look.
    assert float(scores.values["copying"][1, 0]) == pytest.approx(1.0)
    assert float(scores.values["own_token_first"][1, 0]) == 1.0
    assert bool(scores.values["copying"][0].isnan().all())


def test_scores_are_mean_weights_of_the_right_places(demo) -> None:
    repeated = repeated_tokens(demo, n_sequences=5, length=9)
    scores = head_scores(demo, repeated, copying=False)
    pattern = demo.run(repeated.batch, capture="attn.2.pattern", logits=None)["attn.2.pattern"]
    looks = {"induction": 8, "duplicate_token": 9, "present_token": 0}
    for kind, back in looks.items():
        for head in (0, 4):
            picked = [
                float(pattern[row, head, column, column - back])
                for row in range(5)
                for column in range(10, 19)
            ]
            expected = sum(picked) / len(picked)
            assert float(scores.values[kind][2, head]) == pytest.approx(expected, abs=1e-6)
    before = [
        float(pattern[row, 1, column, column - 1]) for row in range(5) for column in range(1, 19)
    ]
    found = float(scores.values["previous_token"][2, 1])
    assert found == pytest.approx(sum(before) / len(before), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_matrices_are_those_of_the_heads(family: str) -> None:
    model = loaded(family)
    batch = TokenBatch.from_ids([[1, 17, 40, 5]])
    run = model.run(batch, capture=["attn.1.z", "attn.1.head.*.out"], logits=None)
    matrices = output_matrices(model, 1)
    for head in range(model.n_heads):
        written = run["attn.1.z"][0, :, head].double() @ matrices[head]
        torch.testing.assert_close(
            written.float(), run[f"attn.1.head.{head}.out"][0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_scores_within_their_bounds(family: str) -> None:
    model = loaded(family)
    scores = head_scores(model, repeated_tokens(model, n_sequences=2, length=6))
    table = scores.table()
    assert table.height == model.n_layers * model.n_heads and not scores.notes
    for kind in ("induction", "previous_token", "duplicate_token", "own_token_first"):
        assert table[kind].is_between(0, 1).all()
    assert table["copying"].is_between(-1, 1).all()


def test_copying_against_the_whole_circuit(demo) -> None:
    """A small matrix has the nonzero eigenvalues of values times readings, token by token."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    read = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    large = torch.linalg.eigvals(values @ read.T)
    small = torch.linalg.eigvals(values.T @ read)
    kept = large[large.abs().argsort(descending=True)[:4]]
    torch.testing.assert_close(kept.abs().sort().values, small.abs().sort().values)


def test_induction_heads_of_the_embedded_model_do_its_copying(demo) -> None:
    repeated = repeated_tokens(demo, seed=1)
    scores = head_scores(demo, repeated)
    found = scores.above("induction", 0.5)
    assert found and all(layer == 2 for layer, _ in found)
    assert all(float(scores.values["copying"][head]) > 0.9 for head in found)
    for kind in ("mean", "zero"):
        ablation = ablate_heads(demo, repeated, found, kind=kind)
        assert ablation.whole[1] > 0.95
        assert ablation.ratio is not None and ablation.ratio > 5
        assert ablation.drop > max(ablation.control_drops)


def test_ablation_measures_the_copying_of_the_second_half(demo) -> None:
    repeated = repeated_tokens(demo, n_sequences=3, length=8)
    logprob, right = copying_logprob(demo, repeated)
    assert logprob.shape == right.shape == (3, 7)
    logits = demo.run(repeated.batch).logits.log_softmax(-1)
    for row in range(3):
        for place, column in enumerate(range(9, 16)):
            token = int(repeated.batch.ids[row, column + 1])
            assert float(logprob[row, place]) == pytest.approx(
                float(logits[row, column, token]), abs=1e-4
            )


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_direct_shares_are_those_of_the_logits(family: str) -> None:
    """A head's share of the right token's logit, less that of every token of the sequence."""
    model = loaded(family)
    repeated = repeated_tokens(model, n_sequences=3, length=3)
    ids = repeated.batch.ids
    own = ids[:, repeated.front : repeated.front + 3]
    total = torch.zeros(model.n_heads, dtype=torch.float64)
    for column in repeated.predicted:
        shares = []
        for answers in (ids[:, column + 1], *own.T):
            found = direct_logit_attribution(model, repeated.batch, answers, position=column)
            heads = [found.parts[f"attn.1.head.{head}"].mean() for head in range(model.n_heads)]
            shares.append(torch.stack(heads))
        total += shares[0] - torch.stack(shares[1:]).mean(0)
    scores = direct_scores(model, repeated)
    torch.testing.assert_close(scores[1], total / 2, rtol=1e-3, atol=1e-5)


def test_heads_alone_are_ablated_by_edits_of_the_whole_pass(demo) -> None:
    repeated = repeated_tokens(demo, n_sequences=3, length=6)
    whole, _ = copying_logprob(demo, repeated)
    for kind, edit in (("zero", ZeroAblate), ("resample", ResampleAblate)):
        drops = drops_alone(demo, repeated, 2, kind=kind)
        for head in (0, 3):
            without, _ = copying_logprob(demo, repeated, [edit(f"attn.2.head.{head}.z")])
            assert float(drops[head]) == pytest.approx(float((whole - without).mean()), abs=1e-4)


def test_sequences_are_cut_into_even_parts(demo) -> None:
    parts = parts_of(repeated_tokens(demo, n_sequences=33, length=3), 32)
    assert [len(part.batch) for part in parts] == [16, 17]
    with pytest.raises(ConfigError, match="use zero, mean, resample"):
        drops_alone(demo, parts[0], 2, kind="noise")  # type: ignore[arg-type]


def test_ablation_draws_are_seeded_and_leave_the_heads_out(demo) -> None:
    repeated = repeated_tokens(demo, n_sequences=2, length=6)
    first = ablate_heads(demo, repeated, [(2, 0)], n_controls=3, seed=5)
    assert first == ablate_heads(demo, repeated, [(2, 0)], n_controls=3, seed=5)
    assert first != ablate_heads(demo, repeated, [(2, 0)], n_controls=3, seed=6)
    every = [(layer, head) for layer in range(8) for head in range(6)]
    with pytest.raises(ConfigError, match="48 heads cannot be compared"):
        ablate_heads(demo, repeated, every)


def test_the_toy_reads_tokens_and_writes_previous() -> None:
    """The layout that the other tests rely on."""
    matrices = output_matrices(induction_toy(3.0).model, 0)
    assert torch.equal(matrices[0][: TOKEN.stop, PREVIOUS], torch.eye(TOKEN.stop).double())
