"""The streaming readout against the slow one, over heads, dtypes, budgets and references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerscope.errors import ConfigError
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
from readout.reference import slow_cosine, slow_divergences, slow_logits, slow_rank, slow_row

LAYERS, POSITIONS, WIDTH, VOCAB = 4, 5, 24, 333


@pytest.fixture(autouse=True, params=["plain", "fused"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with either kind of passes."""
    if request.param == "fused":
        pytest.importorskip("numba")
    monkeypatch.setattr(fused, "FROM_LOGITS", 0 if request.param == "fused" else 1 << 60)
    return request.param


def _head(kind: str, dtype: torch.dtype = torch.float32, *, vocab: int = VOCAB) -> Unembedding:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(vocab, WIDTH, generator=generator).mul(0.6).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    return {
        "plain": Unembedding(weight),
        "bias": Unembedding(weight, bias=bias),
        "softcap": Unembedding(weight, softcap=5.0),
        "all": Unembedding(weight, bias=bias, scale=0.7, softcap=8.0),
        "far": Unembedding(weight, bias=torch.full((vocab,), -120.0)),
    }[kind]


def _hidden(rows: int = LAYERS * POSITIONS, seed: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def _last_rows() -> Tensor:
    """Reference of row (layer, pos): the row (last layer, pos)."""
    return (LAYERS - 1) * POSITIONS + torch.arange(POSITIONS).repeat(LAYERS)


def _close(actual: Tensor, expected: list[float], tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


def _check_plain(result: Readout, logits: Tensor, tolerance: float = 2e-5) -> None:
    slow = [slow_row(row, k=6) for row in logits]
    names = ("logsumexp", "entropy_bits", "top_log2p", "top1_top2_gap", "max_abs_logit")
    for name in (*names, "min_log2p"):
        _close(getattr(result, name), [row[name] for row in slow], tolerance)
    assert result.top_ids is not None
    assert result.top_ids.tolist() == [row["top_ids"] for row in slow]


def _check_divergences(result: Readout, group: str, logits: Tensor, other: Tensor) -> None:
    slow = [slow_divergences(z, q) for z, q in zip(logits, other, strict=True)]
    for name in slow[0]:
        _close(getattr(getattr(result, group), name), [row[name] for row in slow])


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "all", "far"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_statistic_equals_the_slow_reference(kind: str, dtype: torch.dtype) -> None:
    head, hidden = _head(kind, dtype), _hidden()
    index = _last_rows()
    tokens = torch.tensor([[row * 7 % VOCAB, row * 31 % VOCAB] for row in range(len(hidden))])
    result = readout(
        hidden, head, request=Request(top_k=6), reference=Reference(index=index), tokens=tokens
    )
    logits = slow_logits(hidden, head)
    _check_plain(result, logits)
    _check_divergences(result, "reference", logits, logits[index])
    log_p = torch.log_softmax(logits, -1)
    assert result.token_rank is not None
    assert result.token_rank.tolist() == [
        [slow_rank(z, int(token)) for token in row] for z, row in zip(logits, tokens, strict=True)
    ]
    assert result.token_log2p is not None
    _close(result.token_log2p, (log_p.gather(1, tokens) / torch.log(torch.tensor(2.0))).tolist())
    bare = hidden.double() @ head.weight.double().T
    assert result.reference is not None
    assert result.reference.cosine is not None
    _close(
        result.reference.cosine,
        [slow_cosine(z, bare[int(ref)]) for z, ref in zip(bare, index, strict=True)],
    )
    assert result.cos_to_token is not None
    _close(
        result.cos_to_token,
        [
            [slow_cosine(h, head.weight[int(token)]) for token in row]
            for h, row in zip(hidden, tokens, strict=True)
        ],
    )
    assert not result.nonfinite.any()


@pytest.mark.parametrize("form", ["rows", "hidden", "logits"])
def test_the_three_forms_of_a_reference_agree(form: str) -> None:
    head, hidden = _head("all"), _hidden()
    last = hidden[-POSITIONS:]
    logits = slow_logits(hidden, head)
    position = torch.arange(POSITIONS).repeat(LAYERS)
    reference = {
        "rows": Reference(index=_last_rows()),
        "hidden": Reference(index=position, hidden=last),
        "logits": Reference(index=position, logits=slow_logits(last, head).float()),
    }[form]
    result = readout(hidden, head, reference=reference)
    _check_divergences(result, "reference", logits, logits[_last_rows()])
    assert result.reference is not None
    if form == "logits":  # a capped logit has no untransformed product to take a cosine with
        assert result.reference.cosine is None
    else:
        assert result.reference.cosine is not None
        _close(result.reference.cosine[-POSITIONS:], [1.0] * POSITIONS)


def test_a_row_does_not_diverge_from_itself_at_all() -> None:
    result = readout(_hidden() * 5, _head("plain"), reference=Reference(index=_last_rows()))
    assert result.reference is not None
    assert result.reference.kl_to_bits is not None
    assert result.reference.kl_from_bits is not None
    assert result.reference.kl_to_bits[-POSITIONS:].max() == 0
    assert result.reference.kl_from_bits[-POSITIONS:].max() == 0


def test_kl_does_not_saturate_where_probabilities_underflow() -> None:
    head = Unembedding(torch.eye(3))
    hidden = torch.tensor([[0.0, 400.0, 0.0], [400.0, 0.0, 0.0]])
    result = readout(hidden, head, reference=Reference(index=torch.tensor([1, 1])))
    logits = slow_logits(hidden, head)
    _check_divergences(result, "reference", logits, logits[[1, 1]])
    assert result.reference is not None
    assert result.reference.kl_to_bits is not None
    assert result.reference.kl_to_bits[0] > 500  # 400 / ln 2, far beyond log2(1e30)


@pytest.mark.parametrize("rows_that_fit", [20, 25, 40, 60, 400])
@pytest.mark.parametrize("with_against", [False, True])
def test_results_do_not_depend_on_the_tile_size(rows_that_fit: int, with_against: bool) -> None:
    head, hidden = _head("plain"), _hidden()
    against = _hidden(seed=11) if with_against else None
    tokens = torch.arange(len(hidden))[:, None]

    def run(budget_bytes: int) -> Readout:
        return readout(
            hidden,
            head,
            request=Request(top_k=6, overlap_k=9),
            reference=Reference(index=_last_rows()),
            against=against,
            tokens=tokens,
            budget_bytes=budget_bytes,
        )

    small, large = run(4 * VOCAB * rows_that_fit), run(1 << 30)
    logits = slow_logits(hidden, head)
    for result in (small, large):
        _check_plain(result, logits)
        _check_divergences(result, "reference", logits, logits[_last_rows()])
        if against is not None:
            _check_divergences(result, "against", logits, slow_logits(against, head))
    assert small.token_rank is not None
    assert large.token_rank is not None
    assert small.overlap_ids is not None
    assert large.overlap_ids is not None
    assert torch.equal(small.token_rank, large.token_rank)
    assert torch.equal(small.overlap_ids, large.overlap_ids)


def test_the_same_call_gives_the_same_bytes() -> None:
    def run() -> Readout:
        return readout(_hidden(), _head("all"), reference=Reference(index=_last_rows()))

    first, second = run(), run()
    assert torch.equal(first.logsumexp, second.logsumexp)
    assert first.reference is not None
    assert second.reference is not None
    assert first.reference.js_bits is not None
    assert second.reference.js_bits is not None
    assert torch.equal(first.reference.js_bits, second.reference.js_bits)


def test_rows_without_a_reference_and_ragged_groups() -> None:
    head, hidden = _head("plain"), _hidden(7)
    index = torch.tensor([6, -1, 6, 2, 6, -1, 6])
    result = readout(hidden, head, reference=Reference(index=index))
    logits = slow_logits(hidden, head)
    assert result.reference is not None
    assert result.reference.kl_to_bits is not None
    for row, target in enumerate(index.tolist()):
        actual = result.reference.kl_to_bits[row]
        if target < 0:
            assert actual.isnan()
        else:
            expected = slow_divergences(logits[row], logits[target])["kl_to_bits"]
            assert float(actual) == pytest.approx(expected, abs=2e-5)
    _close(result.entropy_bits, [slow_row(z, k=2)["entropy_bits"] for z in logits])


def test_against_another_lens() -> None:
    head, hidden, other = _head("bias"), _hidden(), _hidden(seed=5)
    result = readout(hidden, head, request=Request(overlap_k=50), against=other)
    logits, theirs = slow_logits(hidden, head), slow_logits(other, head)
    _check_divergences(result, "against", logits, theirs)
    expected: list[float] = []
    for z, q in zip(logits, theirs, strict=True):
        left = set(slow_row(z, k=50)["top_ids"])
        right = set(slow_row(q, k=50)["top_ids"])
        expected.append(len(left & right) / len(left | right))
    assert result.against is not None
    assert result.against.jaccard is not None
    _close(result.against.jaccard, expected)
    assert result.against.cosine is not None
    bare, bare_other = hidden @ head.weight.T, other @ head.weight.T
    _close(
        result.against.cosine,
        [slow_cosine(a, b) for a, b in zip(bare, bare_other, strict=True)],
    )


def test_masses_of_token_sets() -> None:
    head, hidden = _head("plain"), _hidden(6)
    members = [[1, 2, 3, 3], [200], []]
    index = torch.tensor([[0, 1], [1, 0], [2, -1], [0, 0], [1, 1], [-1, 2]])
    result = readout(
        hidden, head, request=Request(overlap_k=50), token_sets=TokenSets.of(members, index)
    )
    logits = slow_logits(hidden, head)
    p = torch.softmax(logits, -1)
    assert result.set_mass is not None
    assert result.set_topk_mass is not None
    assert result.cos_to_set_max is not None
    for row in range(6):
        likeliest = set(slow_row(logits[row], k=50)["top_ids"])
        for column, which in enumerate(index[row].tolist()):
            if which < 0:
                assert result.set_mass[row, column].isnan()
                continue
            ids = set(members[which])
            mass = sum(float(p[row, token]) for token in ids)
            listed = sum(float(p[row, token]) for token in ids & likeliest)
            assert float(result.set_mass[row, column]) == pytest.approx(mass, abs=1e-6)
            assert float(result.set_topk_mass[row, column]) == pytest.approx(listed, abs=1e-6)
            if ids:
                cosine = max(slow_cosine(hidden[row], head.weight[token]) for token in ids)
                assert float(result.cos_to_set_max[row, column]) == pytest.approx(cosine, abs=1e-5)
            else:
                assert result.cos_to_set_max[row, column].isnan()


def test_ties_are_broken_by_the_lowest_id_and_ranks_are_strict() -> None:
    weight = torch.zeros(300, 2)
    weight[[250, 40, 41, 7]] = torch.tensor([1.0, 0.0])
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    result = readout(
        hidden,
        Unembedding(weight),
        request=Request(top_k=6, overlap_k=3),
        tokens=torch.tensor([[250, 0], [299, 5]]),
    )
    assert result.top_ids is not None
    assert result.overlap_ids is not None
    assert result.token_rank is not None
    assert result.top_ids.tolist() == [[7, 40, 41, 250, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert result.overlap_ids.tolist() == [[7, 40, 41], [0, 1, 2]]
    assert result.token_rank.tolist() == [[1, 5], [1, 1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_is_flagged_and_leaves_the_others_alone(bad: float) -> None:
    head, hidden = _head("plain"), _hidden()
    tokens = torch.zeros(len(hidden), 1, dtype=torch.long)
    reference = Reference(index=_last_rows())
    clean = readout(hidden, head, reference=reference, tokens=tokens, against=hidden.flip(0))
    other = hidden.flip(0).clone()
    hidden[2, 0], hidden[8, 3], other[11, 1] = bad, bad, bad
    dirty = readout(hidden, head, reference=reference, tokens=tokens, against=other)
    assert dirty.nonfinite.nonzero().flatten().tolist() == [2, 8]
    assert dirty.top_ids is not None
    assert dirty.token_rank is not None
    assert dirty.top_ids[2].eq(-1).all()
    assert dirty.token_rank[2].item() == 0
    good = ~dirty.nonfinite
    for name, value in _floats(dirty).items():
        compared = good & (torch.arange(len(good)) != 11) if "against" in name else good
        if name == "reference_entropy_bits":  # a property of the reference, not of the row
            compared = torch.ones_like(good)
        assert value[~compared].isnan().all(), name
        torch.testing.assert_close(value[compared], _floats(clean)[name][compared])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["rows", "hidden", "logits"])
def test_a_bad_reference_leaves_the_rows_their_own_statistics(form: str, bad: float) -> None:
    head, hidden = _head("plain"), _hidden()
    clean = readout(hidden, head, reference=Reference(index=_last_rows()))
    last = hidden[-POSITIONS:].clone()
    if form == "logits":
        given = slow_logits(last, head).float()
        given[1, 7] = bad
        reference = Reference(index=torch.arange(POSITIONS).repeat(LAYERS), logits=given)
    else:
        last[1, 3] = bad
        hidden[-POSITIONS:] = last
        reference = Reference(index=_last_rows())
        if form == "hidden":
            reference = Reference(index=torch.arange(POSITIONS).repeat(LAYERS), hidden=last)
    dirty = readout(hidden, head, reference=reference)
    broken = torch.zeros(len(hidden), dtype=torch.bool)
    broken[-POSITIONS + 1] = form != "logits"
    assert torch.equal(dirty.nonfinite, broken)
    apart = torch.arange(len(hidden)) % POSITIONS == 1
    for name, value in _floats(dirty).items():
        missing = apart if "reference" in name else broken
        assert value[missing].isnan().all(), name
        expected = _floats(clean)[name][~missing]
        torch.testing.assert_close(value[~missing], expected, atol=1e-5, rtol=1e-5)


def _floats(result: object, prefix: str = "") -> dict[str, Tensor]:
    """Every floating-point statistic by name, those of `reference` and `against` too."""
    found: dict[str, Tensor] = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found[prefix + name] = value
        elif isinstance(value, Divergences):
            found |= _floats(value, f"{name}.")
    return found


def test_a_cap_does_not_hide_an_infinite_vector() -> None:
    head, hidden = _head("softcap"), _hidden(3)
    hidden[1, 0] = torch.inf  # capped, its logits are finite
    result = readout(hidden, head)
    assert result.nonfinite.tolist() == [False, True, False]
    assert result.logsumexp[1].isnan()


def test_what_is_not_asked_for_is_not_returned() -> None:
    request = Request(
        entropy=False, top_k=0, gap=False, js=False, l1=False, cosine=False, extremes=False
    )
    result = readout(
        _hidden(), _head("plain"), request=request, reference=Reference(index=_last_rows())
    )
    assert result.entropy_bits is None
    assert result.top_ids is None
    assert result.token_rank is None
    assert result.against is None
    assert result.reference is not None
    assert result.reference.js_bits is None
    assert result.reference.kl_to_bits is not None


STATISTICS = ("entropy", "kl_to_reference", "kl_from_reference", "js", "l1", "cosine", "extremes")


@pytest.mark.parametrize("only", ["nothing", *STATISTICS])
@pytest.mark.parametrize("form", ["none", "reference", "against"])
def test_a_statistic_alone_is_the_same_as_among_all(only: str, form: str) -> None:
    head, hidden = _head("all"), _hidden()
    reference = Reference(index=_last_rows()) if form == "reference" else None
    against = _hidden(seed=5) if form == "against" else None
    flags = {name: name == only for name in STATISTICS}
    alone = readout(
        hidden,
        head,
        request=Request(top_k=0, gap=False, **flags),
        reference=reference,
        against=against,
    )
    both = readout(hidden, head, reference=reference, against=against)
    _agree(alone, both, {"logsumexp", "nonfinite", "reference", "against"})
    assert (alone.entropy_bits is not None) == (only == "entropy")
    assert (alone.min_log2p is not None) == (only == "extremes")
    if form != "none":
        found = getattr(alone, form)
        names = {
            "kl_to_reference": "kl_to_bits",
            "kl_from_reference": "kl_from_bits",
            "js": "js_bits",
            "l1": "l1",
            "cosine": "cosine",
        }
        for flag, name in names.items():
            assert (getattr(found, name) is not None) == (only == flag)


def _agree(part: object, whole: object, needed: set[str]) -> None:
    """Check that what is there in `part` is also in `whole`, and equal."""
    for name, value in vars(part).items():
        other = getattr(whole, name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5)
        elif isinstance(value, Divergences):
            _agree(value, other, set())
        elif value is None:
            assert name not in needed or other is None


def test_caller_s_tensors_are_left_alone() -> None:
    hidden, head = _hidden(), _head("all")
    before, weight = hidden.clone(), head.weight.clone()
    readout(hidden, head, reference=Reference(index=_last_rows()), against=hidden)
    assert torch.equal(hidden, before)
    assert torch.equal(head.weight, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(0, WIDTH)}, "at least one row"),
        ({"hidden": torch.zeros(2, WIDTH + 1)}, "needs"),
        ({"budget_bytes": 100}, "pass at least"),
        ({"tokens": torch.full((3, 1), VOCAB)}, "allowed are -1"),
        ({"against": torch.zeros(2, WIDTH)}, "rows of the other lens"),
        ({"reference": Reference(index=torch.tensor([0, 1, 3]))}, "allowed are -1"),
        ({"reference": Reference(index=torch.tensor([0, 1]))}, "one per row"),
        ({"products": "fast"}, "unknown products"),
    ],
)
def test_bad_input_names_the_fix(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"hidden": _hidden(3), "unembedding": _head("plain")} | change
    with pytest.raises(ConfigError, match=message):
        readout(**arguments)  # pyright: ignore[reportArgumentType]


def test_a_saturated_softcap_keeps_the_order_of_what_it_rounds_together() -> None:
    width, vocab = 8, 40
    weight = torch.zeros(vocab, width)
    weight[:, 0] = torch.arange(vocab)
    hidden = torch.zeros(2, width)
    hidden[0, 0], hidden[1, 0] = 100.0, 0.1
    head = Unembedding(weight, softcap=5.0)
    capped = head.logits(hidden)
    assert int((capped[0] == capped[0].max()).sum()) > 10  # the cap has made ties
    answers = torch.tensor([[30], [30]])
    result = readout(hidden, head, request=Request(top_k=5, overlap_k=5), tokens=answers)
    best_first = list(range(vocab - 1, vocab - 6, -1))
    assert result.top_ids is not None and result.overlap_ids is not None
    assert result.top_ids.tolist() == [best_first, best_first]
    assert result.overlap_ids.tolist() == [best_first, best_first]
    assert result.token_rank is not None and result.token_rank.flatten().tolist() == [10, 10]
    assert result.token_logit is not None and result.top_logits is not None
    torch.testing.assert_close(result.token_logit[:, 0], capped[:, 30])
    torch.testing.assert_close(result.top_logits, capped[:, best_first])
    given = readout(
        hidden,
        head,
        reference=Reference(index=torch.arange(2), logits=capped),
        request=Request(top_k=0, cosine=False),
    )
    assert given.reference is not None and given.reference.kl_to_bits is not None
    assert given.reference.kl_to_bits.max() < 1e-5
