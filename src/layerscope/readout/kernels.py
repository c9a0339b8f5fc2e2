"""The passes over logits as compiled loops.

Importing this module compiles them, or loads them from numba's cache.
Each loop goes over one row at a time and does all that can be done to an entry while it is at
hand; `passes` says the same in whole-array operations and is the reference. Sums are taken in
float32 over short stretches and in float64 over those. The compiler may reorder sums and fuse
products with them, nothing else: NaN and infinity stay what they are.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from layerscope.products.compiling import compiled
from layerscope.products.powers import exp2

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

VERSION = f"numba {numba.__version__}"

# Columns of `moments` and of `compared`.
LARGEST, LEAST, SQUARE, SHIFT, TOTAL, MEAN = range(6)
P_DIFFERENCE, Q_DIFFERENCE, OTHER_DIFFERENCE, MIXTURE, OVERLAP, FINITE = range(6)

_STRETCH = 1024  # entries summed in float32
_EXP2_RANGE = np.float32(60.0)  # as in `passes`
_TINY = np.float32(np.finfo(np.float32).tiny)
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)

_EXPONENT_BITS = np.int32(23)

# log2(1 + t) / t for 1 + t between sqrt(1/2) and sqrt(2): error 7e-9 before rounding, fitted alike.
_L0, _L1, _L2 = np.float32(1.44269487), np.float32(-0.72134713), np.float32(0.48092242)
_L3, _L4, _L5 = np.float32(-0.36072114), np.float32(0.28765875), np.float32(-0.23852122)
_L6, _L7, _L8 = np.float32(0.21736586), np.float32(-0.21028954), np.float32(0.12542728)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)

_SUMS = {"reassoc", "contract", "nsz", "arcp"}


@compiled(fastmath={"contract"}, inline=True)
def log2(x: np.float32) -> np.float32:
    """Return the base-2 logarithm of a positive normal number."""
    bits = np.float32(x).view(np.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> _EXPONENT_BITS
    t = np.int32(bits - (exponent << _EXPONENT_BITS)).view(np.float32) - _ONE
    upper = ((_L8 * t + _L7) * t + _L6) * t + _L5
    lower = ((((upper * t + _L4) * t + _L3) * t + _L2) * t + _L1) * t + _L0
    return lower * t + np.float32(exponent)


@compiled(fastmath=_SUMS)
def _maxima(row: Floats, maxima: Floats) -> np.float32:
    """Write the largest of the entries b, b + n, b + 2 n, ... of every block b; return the largest.

    Neighbours, which are often likely together, fall into different blocks. NaN counts for nothing.
    """
    n = len(maxima)
    maxima[:] = -np.inf
    for first in range(0, len(row), n):
        part = row[first : first + n]
        for block in range(len(part)):
            z = part[block]
            maxima[block] = z if z > maxima[block] else maxima[block]
    largest = maxima[0]
    for block in range(1, n):
        largest = maxima[block] if maxima[block] > largest else largest
    return largest


@compiled(fastmath=_SUMS)
def _kth_largest(values: Floats, k: int) -> np.float32:
    """Return the k-th largest of some values without NaN (Hoare's selection); reorders them."""
    low, high, wanted = 0, len(values) - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while values[left] > pivot:
                left += 1
            while values[right] < pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if wanted <= right:
            high = right
        elif wanted >= left:
            low = left
        else:
            break
    return values[wanted]


@compiled(fastmath=_SUMS)
def _largest(row: Floats, bound: np.float32, values: Floats, ids: Integers) -> None:
    """Keep the largest entries and their ids, largest first, ties by lowest id.

    Args:
        row: entries; at least as many as are kept reach `bound`.
        bound: smaller entries cannot be among the largest.
        values: filled from the front, with -inf and id 0 behind where entries are NaN.
        ids: the ids of `values`.
    """
    k, kept = len(values), 0
    values[:] = -np.inf
    ids[:] = 0
    for first in range(0, len(row), 64):
        part = row[first : first + 64]
        reaching = np.int32(0)
        for token in range(len(part)):
            reaching += np.int32(part[token] >= bound)
        if reaching == 0:
            continue
        for token in range(len(part)):
            z = part[token]
            # Ids come in rising order: of equal entries, the one that is there stays.
            if not (z >= bound) or (kept == k and not (z > values[k - 1])):
                continue
            place = min(kept, k - 1)
            kept = min(kept + 1, k)
            while place > 0 and values[place - 1] < z:
                values[place], ids[place] = values[place - 1], ids[place - 1]
                place -= 1
            values[place], ids[place] = z, first + token


@compiled(fastmath=_SUMS)
def _count_above(row: Floats, threshold: np.float32) -> int:
    """Count the entries strictly above a threshold."""
    above = 0
    for first in range(0, len(row), _STRETCH):
        part, some = row[first : first + _STRETCH], np.int32(0)
        for token in range(len(part)):
            some += np.int32(part[token] > threshold)
        above += some
    return int(above)


@compiled(fastmath=_SUMS)
def _least(row: Floats) -> np.float32:
    """Return the smallest entry; NaN counts for nothing."""
    lanes = np.full(64, np.inf, np.float32)
    for first in range(0, len(row), 64):
        part = row[first : first + 64]
        for lane in range(len(part)):
            z = part[lane]
            lanes[lane] = z if z < lanes[lane] else lanes[lane]
    least = lanes[0]
    for lane in range(1, 64):
        least = lanes[lane] if lanes[lane] < least else least
    return least


@compiled(fastmath=_SUMS)
def _exponentiate(row: Floats, p: Floats, moments: Doubles) -> None:
    """Write ``p = 2 ** (row - shift)``; fill in the sums of p, p times row and squares."""
    shift = np.float32(moments[LARGEST])
    if not abs(shift) > _EXP2_RANGE:
        shift = _ZERO
    total = mean = square = 0.0
    for first in range(0, len(row), _STRETCH):
        part, powers = row[first : first + _STRETCH], p[first : first + _STRETCH]
        some_p = some_mean = some_square = _ZERO
        for token in range(len(part)):
            z = part[token]
            power = exp2(z - shift)
            powers[token] = power
            some_p += power
            some_mean += power * z
            some_square += z * z
        total += some_p
        mean += some_mean
        square += some_square
    moments[SHIFT], moments[TOTAL], moments[MEAN], moments[SQUARE] = shift, total, mean, square


@compiled(fastmath=_SUMS)
def _normalise(row: Floats, p: Floats, total: float) -> bool:
    """Divide exponentials by their sum, in place, but keep them in the domain of `log2`.

    Returns:
        Whether all logits are finite.
    """
    factor = np.float32(1.0 / total)
    finite = True
    for first in range(0, len(p), _STRETCH):
        part, powers = row[first : first + _STRETCH], p[first : first + _STRETCH]
        check = _ZERO
        for token in range(len(part)):
            q = powers[token] * factor
            powers[token] = _TINY if q < _TINY else q
            check += part[token] * _ZERO
        finite &= check == _ZERO
    return finite


@compiled(fastmath=_SUMS)
def _differ(row: Floats, p: Floats, other: Floats, q: Floats, sums: Doubles) -> None:
    """Fill in the inner products of ``row - other`` with p, with q and with the other logits."""
    with_p = with_q = with_other = 0.0
    for first in range(0, len(row), _STRETCH):
        mine, theirs = row[first : first + _STRETCH], other[first : first + _STRETCH]
        my_p, their_p = p[first : first + _STRETCH], q[first : first + _STRETCH]
        some_p = some_q = some_other = _ZERO
        for token in range(len(mine)):
            difference = mine[token] - theirs[token]
            some_p += my_p[token] * difference
            some_q += their_p[token] * difference
            some_other += theirs[token] * difference
        with_p += some_p
        with_q += some_q
        with_other += some_other
    sums[P_DIFFERENCE], sums[Q_DIFFERENCE], sums[OTHER_DIFFERENCE] = with_p, with_q, with_other


@compiled(fastmath=_SUMS)
def _mix(p: Floats, total: float, q: Floats, sums: Doubles) -> None:
    """With ``m = p / total + q``, fill in the sums of m log2 m and of min(m, 2 q)."""
    factor = np.float32(1.0 / total)
    mixture = overlap = 0.0
    for first in range(0, len(p), _STRETCH):
        mine, theirs = p[first : first + _STRETCH], q[first : first + _STRETCH]
        some_mixture = some_overlap = _ZERO
        for token in range(len(mine)):
            m, twice = mine[token] * factor + theirs[token], _TWO * theirs[token]
            some_mixture += m * log2(m)
            some_overlap += m if m < twice else twice
        mixture += some_mixture
        overlap += some_overlap
    sums[MIXTURE], sums[OVERLAP] = mixture, overlap


@compiled(fastmath=_SUMS)
def _prepare(row: Floats, q: Floats, moments: Doubles) -> bool:
    """Write the probabilities of a row that others are compared with; return if it is finite."""
    _exponentiate(row, q, moments)
    return _normalise(row, q, moments[TOTAL])


@compiled(fastmath=_SUMS)
def _sum(
    row: Floats,
    p: Floats,
    total: float,
    other: Floats,
    q: Floats,
    sums: Doubles,
    differ: bool,
    mix: bool,
) -> None:
    """Compare one row with another."""
    if differ:
        _differ(row, p, other, q, sums)
    if mix:
        _mix(p, total, q, sums)


@compiled(
    "void(float32[:,:,::1], int64, int64, float32[:,:,::1], float32[::1], float64[:,:,::1],"
    " int64[:,:,::1], float32[:,:,::1], int64[:,:,::1])",
    fastmath=_SUMS,
)
def rank(
    z: Floats,
    first: int,
    last: int,
    thresholds: Floats,
    maxima: Floats,
    moments: Doubles,
    above: Integers,
    top_z: Floats,
    top_ids: Integers,
) -> None:
    """Fill in what depends on the order of logits, for the slots from `first` to before `last`.

    Args:
        z: [group, slot, vocab] logits.
        first: the first of the slots.
        last: the slot behind them.
        thresholds: [group, row, n_tok] logits of which the rank is wanted.
        maxima: [block] scratch.
        moments: [group, slot, 6] takes LARGEST.
        above: [group, row, n_tok] takes the numbers of logits above the thresholds.
        top_z: [group, slot, k] takes the largest logits.
        top_ids: [group, slot, k] takes their ids.
    """
    k = top_z.shape[2]
    for group in range(z.shape[0]):
        for slot in range(first, last):
            row = z[group, slot]
            moments[group, slot, LARGEST] = _maxima(row, maxima)
            if k > 0:
                bound = _kth_largest(maxima, k) if k <= len(maxima) else -np.float32(np.inf)
                _largest(row, bound, top_z[group, slot], top_ids[group, slot])
            if slot < above.shape[1]:
                for column in range(above.shape[2]):
                    threshold = thresholds[group, slot, column]
                    above[group, slot, column] = _count_above(row, threshold)


@compiled(
    "void(float32[:,:,::1], int64, int64, int64, int64, boolean, boolean, boolean, boolean,"
    " float32[:,::1], float64[:,:,::1], float64[:,:,:,:])",
    fastmath=_SUMS,
)
def compare(
    z: Floats,
    first: int,
    last: int,
    n_out: int,
    reference: int,
    paired: bool,
    extremes: bool,
    differ: bool,
    mix: bool,
    scratch: Floats,
    moments: Doubles,
    compared: Doubles,
) -> None:
    """Fill in what depends on probabilities, for the rows from `first` to before `last`.

    Args:
        z: [group, slot, vocab] logits in bits, with the head's softcap.
        first: the first of the rows.
        last: the row behind them; sums of the reference itself come with the last of all rows.
        n_out: how many slots of each group are the caller's rows.
        reference: slot of the reference, or -1; as a row, it is not compared with itself.
        paired: whether the next `n_out` slots are what the rows are compared with one by one.
        extremes: whether LEAST is wanted.
        differ: whether the inner products of differences are wanted.
        mix: whether the sums over mixtures are wanted.
        scratch: [3, vocab]
        moments: [group, slot, 6] holds LARGEST and takes everything else.
        compared: [2, group, row, 6] takes the sums of comparisons with the counterparts and with
            the reference.
    """
    p, q, q_other = scratch[0], scratch[1], scratch[2]
    for group in range(z.shape[0]):
        finite = False
        if reference >= 0:
            known = moments[group, reference].copy()
            finite = _prepare(z[group, reference], q, known)
            compared[1, group, first:last, FINITE] = np.float64(finite)
            if last == n_out:
                moments[group, reference] = known
        for slot in range(first, last):
            row, held = z[group, slot], moments[group, slot]
            if extremes:
                held[LEAST] = _least(row)
            if slot != reference or paired:
                _exponentiate(row, p, held)
            if slot != reference and finite:
                sums = compared[1, group, slot]
                _sum(row, p, held[TOTAL], z[group, reference], q, sums, differ, mix)
            if paired:
                other, sums = z[group, n_out + slot], compared[0, group, slot]
                if _prepare(other, q_other, moments[group, n_out + slot]):
                    sums[FINITE] = 1.0
                    _sum(row, p, held[TOTAL], other, q_other, sums, differ, mix)
