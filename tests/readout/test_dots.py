"""The compiled product of few rows, against float64 and its own bound, and inside the readout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from layerscope.readout import Readout, Reference, Request, TokenSets, Unembedding, fused, readout

pytest.importorskip("numba")

from layerscope.readout import dots

F = np.float32
WIDTHS = (1, 3, 15, 16, 17, 24, 100, 768)


def _pair(rows: int, tokens: int, d: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([seed, rows, tokens, d])
    x = generator.normal(size=(rows, d)).astype(F)
    # Products of opposite sign cancel; errors stand out against what is left.
    return x, (generator.normal(size=(tokens, d)) * 2.0 ** generator.integers(-8, 8)).astype(F)


def _product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.full((len(x), len(w)), 7, F)
    dots.multiply(x, w, out)
    return out


def _check(found: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    absolute = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    assert (np.abs(found - exact) <= dots.bound(x.shape[1]) * absolute).all()


@pytest.mark.parametrize("d", WIDTHS)
def test_every_number_of_rows_and_tokens_is_within_the_bound(d: int) -> None:
    for rows in range(1, fused.FEW_ROWS + 1):
        for tokens in (1, 2, 3, 4, 5, 37):
            x, w = _pair(rows, tokens, d)
            _check(_product(x, w), x, w)


def test_the_bound_is_that_of_float32() -> None:
    assert dots.bound(768) < 64 * 2.0**-24 if dots.WIDTH == 16 else dots.bound(768) < 1e-4
    x, w = _pair(13, 400, 768)
    low = torch.from_numpy(x).bfloat16().float().numpy()
    with pytest.raises(AssertionError):
        _check(_product(low, w), x, w)


@pytest.mark.parametrize("d", [24, 64, 100])
def test_an_entry_depends_on_nothing_but_its_row_and_its_token(d: int) -> None:
    x, w = _pair(23, 57, d)
    whole = _product(x, w)
    for first, last in ((0, 1), (3, 20), (22, 23)):
        assert (_product(x[first:last], w) == whole[first:last]).all()
    for cut in range(1, 57, 5):
        apart = np.concatenate([_product(x, w[:cut]), _product(x, w[cut:])], axis=1)
        assert (apart == whole).all()


@pytest.mark.parametrize("tokens", [3, 512, 1027, 2049])
def test_threads_share_the_tokens_and_change_nothing(tokens: int) -> None:
    x, w = _pair(13, tokens, 40)
    together = np.full((13, tokens), 7, F)
    dots.multiply(x, w, together, threads=3)
    assert (together == _product(x, w)).all()
    _check(together, x, w)


def test_rows_may_lie_apart() -> None:
    big_x, big_w = _pair(10, 90, 80)
    x, w = big_x[::2, 5:38], big_w[3:80:3, 7:40]
    out = np.full((9, 60), 7, F)
    dots.multiply(x, w, out[2:7, 11 : 11 + len(w)])
    _check(out[2:7, 11 : 11 + len(w)], x, w)
    kept = out.copy()
    kept[2:7, 11 : 11 + len(w)] = 7
    assert (kept == 7).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("d", [16, 21])
def test_bad_entries_reach_their_own_products_and_no_others(bad: float, d: int) -> None:
    for place in (0, d - 1):
        x, w = _pair(9, 14, d)
        clean = _product(x, w)
        broken = w.copy()
        broken[[6, 13], place] = bad
        found = _product(x, broken)
        assert not np.isfinite(found[:, [6, 13]]).any()
        others = np.delete(np.arange(14), [6, 13])
        assert (found[:, others] == clean[:, others]).all()
        broken = x.copy()
        broken[4, place] = bad
        found = _product(broken, w)
        assert not np.isfinite(found[4]).any()
        assert (np.delete(found, 4, axis=0) == np.delete(clean, 4, axis=0)).all()


def _job(head: str, *, form: str = "rows") -> dict[str, object]:
    generator = torch.Generator().manual_seed(5)
    rows, d, vocab = 13, 40, 1003
    weight = torch.randn(vocab, d, generator=generator) * 0.4
    heads = {
        "plain": Unembedding(weight),
        "all": Unembedding(weight, bias=weight[:, 0].clone(), scale=0.7, softcap=9.0),
        "low": Unembedding(weight.bfloat16()),
        "apart": Unembedding(torch.randn(d, vocab, generator=generator).mul_(0.4).T),
    }
    hidden = torch.randn(rows, d, generator=generator)
    index = torch.full((rows,), rows - 1)
    if form in ("logits", "far"):  # far logits overflow unless their largest is known
        given = heads[head].logits(hidden[-1:]) + (0 if form == "logits" else 300)
        reference = Reference(index=torch.zeros_like(index), logits=given)
    else:
        reference = Reference(index=index)
    return {
        "hidden": hidden,
        "unembedding": heads[head],
        "reference": reference,
        "against": hidden.flip(0) if form == "against" else None,
        "tokens": torch.randint(vocab, (rows, 2), generator=generator),
        "token_sets": TokenSets.of([range(0, vocab, 7)], torch.zeros(rows, 1, dtype=torch.long)),
        "request": Request(top_k=20, overlap_k=50),
    }


def _values(result: object, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif value is not None and not isinstance(value, str):
            found |= _values(value, f"{name}.")
    return found


def _read(job: dict[str, object], which: str) -> Readout:
    return readout(**job, kernels=which)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", ["rows", "logits", "far", "against"])
@pytest.mark.parametrize("head", ["plain", "all", "low", "apart"])
def test_few_rows_in_the_readout(head: str, form: str) -> None:
    job = _job(head, form=form)
    plain, fast = _values(_read(job, "plain")), _values(_read(job, "fused"))
    assert plain.keys() == fast.keys()
    bound = 3e-4 if form == "far" else 3e-5  # what float32 leaves of logits around 300
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name], value, atol=bound, rtol=bound, equal_nan=True, msg=f"{name} differs"
        )


@pytest.mark.parametrize("form", ["rows", "logits", "far", "against"])
@pytest.mark.parametrize("head", ["plain", "all", "low"])
def test_the_number_of_workers_does_not_change_a_byte(head: str, form: str) -> None:
    job, before = _job(head, form=form), torch.get_num_threads()
    found: list[dict[str, Tensor]] = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(_values(_read(job, "fused")))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value.nan_to_num(), others[name].nan_to_num()), name


def test_bad_rows_are_flagged_and_leave_the_others_alone() -> None:
    job = _job("plain")
    clean = _read(job, "fused")
    hidden = job["hidden"]
    assert isinstance(hidden, Tensor)
    hidden[3, 39], hidden[7, 0] = torch.nan, torch.inf
    dirty = _read(job, "fused")
    assert dirty.nonfinite.nonzero().flatten().tolist() == [3, 7]
    good = ~dirty.nonfinite
    assert torch.equal(dirty.logsumexp[good], clean.logsumexp[good])


def test_which_jobs_are_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    multiply = dots.multiply

    def counted(x: np.ndarray, w: np.ndarray, out: np.ndarray, *, threads: int = 1) -> None:
        calls.append(len(x))
        multiply(x, w, out, threads=threads)

    monkeypatch.setattr(dots, "multiply", counted)
    job = _job("plain")
    _read(job, "auto")
    assert not calls
    assert _read(job, "auto").kernels == "plain"
    monkeypatch.setattr(fused, "FROM_LOGITS_OF_FEW", 13 * 1003)
    assert _read(job, "auto").kernels != "plain"
    assert calls and set(calls) == {13}
    calls.clear()
    monkeypatch.setattr(fused, "FEW_ROWS", 12)
    assert _read(job, "auto").kernels == "plain"
    assert _read(job, "fused").kernels != "plain"
    assert not calls
    _read(_job("apart"), "fused")  # entries of a row of weights do not lie side by side
    assert not calls
