"""The compiled loops, one by one and against the plain passes and the slow reference."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.products.hardware import has_matrix_units
from layerscope.readout import (
    Divergences,
    Readout,
    Reference,
    Request,
    TokenSets,
    Unembedding,
    fused,
    readout,
)
from readout.reference import slow_divergences, slow_logits, slow_rank, slow_row

pytest.importorskip("numba")

from layerscope.readout import kernels

F = np.float32
LENGTHS = (1, 63, 64, 65, 1023, 1024, 1025, 5000)


def _row(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(F) * F(3)


def test_logarithms_are_as_accurate_as_float32_over_all_normal_numbers() -> None:
    exact = np.linspace(-126, 10, 40_001)
    x = np.concatenate([np.exp2(exact), np.linspace(0.5, 2.1, 4001)]).astype(F)
    x = np.maximum(x, np.finfo(F).tiny)
    found = np.array([kernels.log2(value) for value in x], dtype=np.float64)
    expected = np.log2(x.astype(np.float64))
    assert (np.abs(found - expected) <= 1.5e-7 * np.maximum(np.abs(expected), 1)).all()
    assert kernels.log2(F(1)) == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_counts_and_extremes(length: int) -> None:
    row = _row(length)
    threshold = row[length // 2]
    assert kernels._count_above(row, threshold) == int((row > threshold).sum())
    assert kernels._least(row) == row.min()
    blocks = np.empty(min(length, 256), F)
    assert kernels._maxima(row, blocks) == row.max()
    assert blocks.tolist() == [row[block :: len(blocks)].max() for block in range(len(blocks))]


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_kth_largest(levels: int, k: int) -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).integers(levels, size=k + 3 * seed).astype(F)
        expected = np.sort(values)[::-1][k - 1]
        assert kernels._kth_largest(values, k) == expected


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal", "few levels"])
@pytest.mark.parametrize("vocab", [60, 1000, 4097])
def test_the_largest_come_first_and_ties_by_lowest_id(order: str, vocab: int) -> None:
    row: np.ndarray = {
        "random": lambda: _row(vocab),
        "rising": lambda: np.arange(vocab, dtype=F),
        "falling": lambda: np.arange(vocab, 0, -1).astype(F),
        "equal": lambda: np.zeros(vocab, F),
        "few levels": lambda: np.random.default_rng(1).integers(4, size=vocab).astype(F),
    }[order]()
    k = 50
    job = np.ascontiguousarray(row[None, None])
    moments, above = np.zeros((1, 1, 6)), np.zeros((1, 1, 0), np.int64)
    top_z, top_ids = np.empty((1, 1, k), F), np.empty((1, 1, k), np.int64)
    maxima = np.empty(min(256, vocab), F)
    kernels.rank(job, 0, 1, np.zeros((1, 1, 0), F), maxima, moments, above, top_z, top_ids)
    expected = sorted(range(vocab), key=lambda token: (-row[token], token))[:k]
    assert top_ids[0, 0].tolist() == expected
    assert top_z[0, 0].tolist() == row[expected].tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_logit_is_seen_wherever_it_stands(bad: float) -> None:
    for place in (0, 63, 64, 1023, 1024, 2999):
        row = _row(3000)
        row[place] = bad
        p, moments = np.empty_like(row), np.zeros(6)
        moments[kernels.LARGEST] = kernels._maxima(row, np.empty(256, F))
        kernels._exponentiate(row, p, moments)
        entropy = math.log2(moments[kernels.TOTAL]) if moments[kernels.TOTAL] > 0 else math.nan
        entropy -= moments[kernels.MEAN] / moments[kernels.TOTAL]
        assert not math.isfinite(entropy)
        assert not kernels._normalise(row, p, moments[kernels.TOTAL])


def _case(vocab: int, spread: float, *, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    rows = 24
    return {
        "hidden": torch.randn(rows, 16, generator=generator) * spread,
        "unembedding": Unembedding(torch.randn(vocab, 16, generator=generator)),
        "reference": Reference(index=20 + torch.arange(4).repeat(6)),
        "against": torch.randn(rows, 16, generator=generator) * spread,
        "tokens": torch.randint(vocab, (rows, 3), generator=generator),
        "token_sets": TokenSets.of([range(0, vocab, 7)], torch.zeros(rows, 1, dtype=torch.long)),
        "request": Request(top_k=20, overlap_k=50),
    }


def _read(case: dict[str, object], which: str) -> Readout:
    return readout(**case, kernels=which)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("vocab", [333, 4099, 32_000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
def test_fused_and_plain_passes_agree(vocab: int, spread: float) -> None:
    case = _case(vocab, spread)
    plain, fast = _read(case, "plain"), _read(case, "fused")
    assert plain.kernels == "plain"
    assert fast.kernels == kernels.VERSION
    for name, value in _tensors(plain).items():
        other = _tensors(fast)[name]
        if not value.is_floating_point():
            assert torch.equal(value, other), name
        else:
            # Larger logits are rounded more coarsely by the products already.
            bound = 2e-5 * max(1.0, spread)
            torch.testing.assert_close(value, other, atol=bound, rtol=2e-5, msg=name)


@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0])
def test_a_wide_vocabulary_against_the_slow_reference(spread: float) -> None:
    case = _case(32_000, spread)
    hidden, head, against = case["hidden"], case["unembedding"], case["against"]
    assert isinstance(hidden, Tensor) and isinstance(against, Tensor)
    assert isinstance(head, Unembedding)
    fast = _read(case, "fused")
    logits, other = slow_logits(hidden, head), slow_logits(against, head)
    assert fast.entropy_bits is not None and fast.top_ids is not None
    assert fast.token_rank is not None
    tokens = case["tokens"]
    assert isinstance(tokens, Tensor)
    for row in range(0, 24, 5):
        expected = slow_row(logits[row], k=20)
        assert float(fast.logsumexp[row]) == pytest.approx(expected["logsumexp"], rel=1e-6)
        assert float(fast.entropy_bits[row]) == pytest.approx(expected["entropy_bits"], abs=2e-5)
        assert fast.top_ids[row].tolist() == expected["top_ids"]
        ranks = [slow_rank(logits[row], int(token)) for token in tokens[row]]
        # float32 logits that lie closer than their rounding may change places.
        assert fast.token_rank[row].tolist() == pytest.approx(ranks, abs=2)
        for group, theirs in (("reference", logits[20 + row % 4]), ("against", other[row])):
            for name, value in slow_divergences(logits[row], theirs).items():
                found = float(getattr(getattr(fast, group), name)[row])
                assert found == pytest.approx(value, abs=2e-5, rel=2e-5), name


def _tensors(result: Readout | Divergences, prefix: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Divergences):
            found |= _tensors(value, f"{name}.")
    return found


def test_the_size_of_a_job_decides_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(333, 1.0)
    monkeypatch.setattr(fused, "FROM_LOGITS", 24 * 333)
    assert _read(case, "auto").kernels == kernels.VERSION
    monkeypatch.setattr(fused, "FROM_LOGITS", 24 * 333 + 1)
    assert _read(case, "auto").kernels == "plain"
    rule = fused.describe()
    assert rule == {
        "numba": kernels.VERSION.removeprefix("numba "),
        "from_logits": 24 * 333 + 1,
        "few_rows": fused.FEW_ROWS,
        "from_logits_of_few_rows": fused.FROM_LOGITS_OF_FEW,
        "matrix_units": has_matrix_units(),
    }


def test_without_numba_the_plain_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_compiled", lambda: None)
    monkeypatch.setattr(fused, "FROM_LOGITS", 0)
    case = _case(333, 1.0)
    assert _read(case, "auto").kernels == "plain"
    with pytest.raises(ConfigError, match=r"layerscope\[fast\]"):
        _read(case, "fused")
    with pytest.raises(ConfigError, match="unknown kernels"):
        _read(case, "fast")


SMALL = """
import sys, torch
from layerscope.readout import Unembedding, readout
result = readout(torch.randn(3, 8), Unembedding(torch.randn(50, 8)))
assert "numba" not in sys.modules, "a small job waited for numba"
sys.modules["numba"] = None
from layerscope.readout import fused
fused.FROM_LOGITS = 0
assert readout(torch.randn(3, 8), Unembedding(torch.randn(50, 8))).kernels == "plain"
"""


def test_a_small_job_does_not_load_numba_and_none_needs_it() -> None:
    subprocess.run([sys.executable, "-c", SMALL], check=True)


def test_loops_that_cannot_be_kept_on_disk_are_compiled_all_the_same() -> None:
    import numba

    nowhere: dict[str, Callable[[float], float]] = {}
    exec("def twice(x):\n    return 2 * x", nowhere)
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit("float64(float64)", cache=True)(nowhere["twice"])
    loop = kernels.compiled("float64(float64)", fastmath=set())(nowhere["twice"])
    assert loop(2.0) == 4.0


def test_the_same_call_gives_the_same_bytes_and_parts_do_not_matter() -> None:
    case = _case(4099, 1.0)
    first, again = _tensors(_read(case, "fused")), _tensors(_read(case, "fused"))
    small = _tensors(_read(case | {"budget_bytes": 4 * 4099 * 30}, "fused"))
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(), again[name].nan_to_num()), name
        torch.testing.assert_close(value, small[name], atol=2e-5, rtol=2e-5, equal_nan=True)
