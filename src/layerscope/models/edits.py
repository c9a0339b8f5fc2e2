"""Edits: what a run changes on its way, told declaratively so that every backend can do it.

An edit names a site (a pattern stands for several), and optionally the batch rows and the token
positions it acts on. Positions are those of the prompt without padding; negative ones count from
its end, so one padded batch can hold many different interventions. Edits of one site apply in the
order given; a capture of that site sees the value after all of them.

No edit changes a dtype or a tensor of the caller's, and one that changes nothing (`Add` of zero,
`Scale` by one, `Clamp` inside its range) leaves the run bit-identical.

Values that broadcast have shape [width], [pos, width] or [row, pos, width], where row and pos count
the selected rows and positions and width is d_model (d_vocab at ``logits``, d_head in a head, the
number of keys in the ``pattern`` of a head). At sites of all heads the selection has one axis more:
[row, pos, head, d_head], or [row, head, pos, key] for ``scores`` and ``pattern``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerscope.errors import EditError
from layerscope.models.sites import Site

if TYPE_CHECKING:
    from layerscope.models.prompts import TokenBatch
    from layerscope.models.scopes import Scope

Positions: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
"""One position, positions shared by all rows, or for each row its own (all of one number)."""


@dataclass(frozen=True, eq=False)
class EditContext:
    """What an edit may look at beside the values it changes.

    Attributes:
        site: where it acts.
        batch: the ids of the run.
        rows: the batch rows selected.
        columns: the padded column of each selected value.
        mask: True where the selected value belongs to a real token.
        activation: the whole activation as this edit found it; not to be written to.
    """

    site: Site
    batch: TokenBatch
    rows: Int[Tensor, " row"]
    columns: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    activation: Float[Tensor, "batch all_pos width"]


EditFunction: TypeAlias = Callable[[Tensor, EditContext], Tensor]


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of all edits.

    Attributes:
        site: where to act; a name or a pattern.
        rows: batch rows to act on; None for all.
        positions: token positions to act on (see `Positions`); None for all.
        scope: instead of positions: which tokens, told by their place in the prompt and after it.
    """

    site: str | Site
    _: KW_ONLY
    rows: int | Sequence[int] | None = None
    positions: Positions | None = None
    scope: Scope | str | None = None

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError when this edit cannot act on selected values of this shape."""

    def transform(
        self, values: Float[Tensor, "row pos width"], context: EditContext
    ) -> Float[Tensor, "row pos width"]:
        """Return the edited values as a new tensor, in any dtype; `values` are not written to."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return a JSON-able account of the edit for provenance; tensors become their shapes."""
        account: dict[str, Any] = {"edit": type(self).__name__}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = {"shape": list(value.shape), "norm": float(value.detach().float().norm())}
            elif value is not None and not isinstance(value, int | float | list | tuple):
                value = str(value)
            account[field.name] = value
        return account


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add ``coefficient * value`` (activation addition, steering)."""

    value: Tensor
    coefficient: float = 1.0

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless `value` broadcasts over the selection."""
        _check_value(self, self.value, shape)

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return the sum, rounded once."""
        return values + self.coefficient * self.value.to(values.device)


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put `value` in place of the activation (activation patching)."""

    value: Tensor

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless `value` broadcasts over the selection."""
        _check_value(self, self.value, shape)

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return a broadcast copy: the run must not hold the caller's own tensor."""
        return self.value.to(values.device, values.dtype).expand_as(values).clone()


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by `factor`."""

    factor: float

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return the product."""
        return values * self.factor


@dataclass(frozen=True, eq=False)
class ZeroAblate(Edit):
    """Put zero in place of the activation."""

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(values)


@dataclass(frozen=True, eq=False)
class MeanAblate(Edit):
    """Put a mean in place of the activation.

    Attributes:
        mean: the mean over a data set ([width], or [pos, width] for means per position); None takes
            the mean over all real tokens of this batch at this site, BOS included.
    """

    mean: Tensor | None = None

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless `mean` broadcasts over the selection."""
        if self.mean is not None:
            _check_value(self, self.mean, shape)

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return a broadcast copy of the mean."""
        mean = self.mean
        if mean is None:
            real = context.batch.attention_mask.to(values.device)
            # Indexing, not multiplying by the mask: padding may hold NaN.
            axis = context.site.pos_axis
            rows = context.activation.movedim(axis, 1)[real]
            mean = rows.to(_accumulator(values)).mean(dim=0)
            if axis == 2:  # [head, key]: the same for every query
                mean = mean.unsqueeze(1)
        return mean.to(values.device, values.dtype).expand_as(values).clone()


@dataclass(frozen=True, eq=False)
class ResampleAblate(Edit):
    """Put the activation of another row of the batch in place, position by position.

    Attributes:
        from_rows: the source row of each selected row; None draws a random other row for each.
        seed: of that draw.
    """

    from_rows: Sequence[int] | None = None
    seed: int = 0

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless there is one source per row."""
        if self.from_rows is not None and len(self.from_rows) != shape[0]:
            raise EditError(
                f"ResampleAblate at '{self.site}' has {len(self.from_rows)} source rows for "
                f"{shape[0]} selected rows; give one each"
            )

    def sources(self, rows: Sequence[int], n_batch: int) -> list[int]:
        """Return the source row of each selected row.

        Raises:
            EditError: a source is outside the batch, or the batch has no other row.
        """
        if self.from_rows is not None:
            for row in self.from_rows:
                _check_row(row, n_batch, self)
            return [row % n_batch for row in self.from_rows]
        if n_batch < 2:
            raise EditError(
                f"ResampleAblate at '{self.site}' needs another row to take from; this batch has 1"
            )
        generator = torch.Generator().manual_seed(self.seed)
        steps = torch.randint(1, n_batch, (len(rows),), generator=generator).tolist()
        return [(row + step) % n_batch for row, step in zip(rows, steps, strict=True)]

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return the source rows' values at the same positions, counted from the prompt's start.

        Positions that were given as negative count from the end of each prompt.
        """
        rows: list[int] = context.rows.tolist()
        batch = context.batch
        sources = self.sources(rows, len(batch))
        columns = context.columns
        if self.positions is not None:
            columns = columns_of(batch, sources, self.positions, self).to(values.device)
        elif any(
            batch.past_length(a) != batch.past_length(b) or batch.lengths[a] != batch.lengths[b]
            for a, b in zip(rows, sources, strict=True)
        ):
            raise EditError(
                f"ResampleAblate at '{self.site}' pairs prompts of different lengths; give "
                "positions that exist in both"
            )
        index = torch.tensor(sources, device=values.device)
        return take(context.activation, index, columns, context.site.pos_axis)


@dataclass(frozen=True, eq=False)
class ProjectOut(Edit):
    """Remove the component within the span of `directions` ([width] or [k, width])."""

    directions: Tensor

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless every direction has this width and is not zero."""
        _check_directions(self, self.directions, shape[-1])

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return ``values - values Q Q^T`` with Q an orthonormal basis of the span."""
        basis = self._basis().to(values.device, _accumulator(values))
        return values - (values.to(basis.dtype) @ basis) @ basis.T

    def _basis(self) -> Float[Tensor, "width rank"]:
        directions = torch.atleast_2d(self.directions.detach().cpu().double())
        unit = directions / directions.norm(dim=-1, keepdim=True)
        _, sizes, basis = torch.linalg.svd(unit, full_matrices=False)
        return basis[sizes > 1e-7 * sizes[0]].T


@dataclass(frozen=True, eq=False)
class Clamp(Edit):
    """Clamp the coordinate along `direction` ([width], normalised here), other coordinates kept.

    Attributes:
        minimum: lowest coordinate allowed, in units of the activation; None for no bound.
        maximum: highest coordinate allowed; None for no bound.
    """

    direction: Tensor
    minimum: float | None = None
    maximum: float | None = None

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless there is one direction of this width and a sane range."""
        _check_directions(self, self.direction, shape[-1])
        if self.direction.ndim != 1:
            raise EditError(f"Clamp at '{self.site}' takes one direction of shape [{shape[-1]}]")
        low, high = self.minimum, self.maximum
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise EditError(
                f"Clamp at '{self.site}' has the range {low} to {high}; give a minimum, a maximum "
                "above it, or both"
            )

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return ``values + (clamp(c) - c) u`` with ``c`` the coordinate along the unit vector."""
        unit = self.direction.detach().to(values.device, _accumulator(values))
        unit = unit / unit.norm()
        coordinate = (values.to(unit.dtype) @ unit)[..., None]
        clamped = coordinate.clamp(self.minimum, self.maximum)
        moved = values + (clamped - coordinate) * unit
        return torch.where(clamped == coordinate, values.to(moved.dtype), moved)


@dataclass(frozen=True, eq=False)
class Apply(Edit):
    """Edit with a plain function ``(activation, context) -> activation``.

    The function gets a copy of the selected values, [row, pos, width] or as the site has it, and
    returns values of the same shape. It may run the model again; such a run sees none of this run's
    edits.
    """

    function: EditFunction

    def transform(self, values: Tensor, context: EditContext) -> Tensor:
        """Return a copy of what the function returns."""
        edited: Any = self.function(values.clone(), context)
        if not isinstance(edited, Tensor):
            raise EditError(
                f"the function applied at '{self.site}' returned {type(edited).__name__}; return "
                f"a tensor of shape {list(values.shape)}"
            )
        return edited.clone()


def take(
    value: Tensor, rows: Int[Tensor, " row"], columns: Int[Tensor, "row pos"], pos_axis: int = 1
) -> Tensor:
    """Return a copy of the selected rows and padded columns of an activation."""
    return value.movedim(pos_axis, 1)[rows[:, None], columns].movedim(1, pos_axis)


def put(
    value: Tensor,
    rows: Int[Tensor, " row"],
    columns: Int[Tensor, "row pos"],
    selected: Tensor,
    pos_axis: int = 1,
) -> Tensor:
    """Return a copy of an activation with selected rows and columns replaced; undoes `take`."""
    result = value.clone()
    result.movedim(pos_axis, 1)[rows[:, None], columns] = selected.movedim(pos_axis, 1)
    return result


def columns_of(
    batch: TokenBatch, rows: Sequence[int], positions: Positions, edit: Edit | None = None
) -> Int[Tensor, "row pos"]:
    """Return the padded columns of unpadded positions in the given rows.

    Raises:
        EditError: positions per row are not one list per row, or not of one length.
        PromptError: a position is outside its prompt.
    """
    where = f"{type(edit).__name__} at '{edit.site}'" if edit is not None else "positions"
    given: Any = positions
    if hasattr(given, "tolist"):  # an array or a tensor
        given = given.tolist()
    listed: list[Any] = [given] if isinstance(given, int) else list(given)
    if listed and not hasattr(listed[0], "__index__"):
        per_row = [[int(position) for position in row] for row in listed]
        if len(per_row) != len(rows) or len({len(row) for row in per_row}) != 1:
            raise EditError(
                f"{where}: positions given per row need one list for each of the {len(rows)} rows, "
                "all of one length"
            )
    else:
        per_row = [[int(position) for position in listed]] * len(rows)
    if not per_row or not per_row[0]:
        raise EditError(f"{where}: no position is selected; use None for all")
    return batch.columns(rows, per_row)


def rows_of(edit: Edit, n_batch: int) -> list[int]:
    """Return the batch rows of an edit, counted from 0.

    Raises:
        EditError: a row is outside the batch or named twice.
    """
    if edit.rows is None:
        return list(range(n_batch))
    rows = [edit.rows] if isinstance(edit.rows, int) else [int(row) for row in edit.rows]
    for row in rows:
        _check_row(row, n_batch, edit)
    rows = [row % n_batch for row in rows]
    if not rows or len(set(rows)) != len(rows):
        raise EditError(f"{type(edit).__name__} at '{edit.site}' needs rows, each named once")
    return rows


def _check_row(row: int, n_batch: int, edit: Edit) -> None:
    if not -n_batch <= row < n_batch:
        raise EditError(
            f"{type(edit).__name__} at '{edit.site}' names row {row}; this batch has rows 0 to "
            f"{n_batch - 1}"
        )


def _check_value(edit: Edit, value: Any, shape: Sequence[int]) -> None:
    suffixes = [list(shape[start:]) for start in range(len(shape) - 1, -1, -1)]
    expected = ", ".join(map(str, suffixes[:-1])) + f" or {suffixes[-1]}"
    name = f"{type(edit).__name__} at '{edit.site}'"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise EditError(f"{name} needs a float tensor of shape {expected}")
    given = tuple(value.shape)
    *leading, width = shape
    fits = 1 <= len(given) <= len(shape) and given[-1] == width
    if not fits or any(
        size not in (wanted, 1) for size, wanted in zip(given[-2::-1], leading[::-1], strict=False)
    ):
        raise EditError(f"{name} has a value of shape {list(given)}; it needs {expected}")


def _check_directions(edit: Edit, directions: Any, width: int) -> None:
    name = f"{type(edit).__name__} at '{edit.site}'"
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        raise EditError(f"{name} needs a float tensor of shape [{width}]")
    if directions.ndim not in (1, 2) or directions.shape[-1] != width or 0 in directions.shape:
        raise EditError(
            f"{name} has directions of shape {list(directions.shape)}; it needs [{width}] or "
            f"[k, {width}]"
        )
    sizes = torch.atleast_2d(directions.detach()).norm(dim=-1)
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise EditError(f"{name} has a direction that is zero or not finite")


def _accumulator(values: Tensor) -> torch.dtype:
    """Return the dtype to project in: float32, or float64 for float64 values."""
    return torch.promote_types(values.dtype, torch.float32)
