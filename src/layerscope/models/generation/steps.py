"""What an edit does in each pass of a generation: the prompt first, then token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from layerscope.errors import EditError
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import Edit, MeanAblate, ResampleAblate, rows_of
from layerscope.models.run import plan
from layerscope.models.scopes import Scope, narrowed

if TYPE_CHECKING:
    from layerscope.models.backends.base import Backend

# Where an edit acts in one pass: everywhere, nowhere, or where a mask over the batch says.
_Where = Callable[[TokenBatch], "Edit | None"]


class EditsByStep:
    """The edits of a generation, as each of its passes needs them."""

    def __init__(
        self, backend: Backend, prompts: TokenBatch, edits: Sequence[Edit], longest: int
    ) -> None:
        """Check the edits.

        `longest` is the length that the longest prompt may reach.

        Raises:
            EditError: an edit cannot be applied in every pass that it is meant for.
        """
        self._prompts = prompts
        self._lengths = torch.tensor(prompts.lengths)
        self._in_prompt: list[_Where] = []
        self._after: list[_Where] = []
        reaching: list[Edit] = []
        for edit in edits:
            if not isinstance(edit, Edit):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise EditError(f"{edit!r} is not an edit; use Add, Replace, ...")
            in_prompt, after = self._split(edit, longest)
            self._in_prompt.append(in_prompt)
            if after is not None:
                _check_alone(edit)
                self._after.append(after)
                reaching.append(replace(edit, scope=None, positions=None))
        self.needs_all_logits = any(fnmatchcase("logits", str(edit.site)) for edit in edits)
        self._check(backend, reaching)

    def of_prompt(self) -> list[Edit]:
        """Return the edits of the pass over the prompts."""
        return _present(where(self._prompts) for where in self._in_prompt)

    def of_rest(self, batch: TokenBatch, past: Bool[Tensor, "batch past"]) -> list[Edit]:
        """Return the edits of a pass over the prompts' last tokens, behind those of no edit."""
        batch = batch.continuing(past)
        return _present(where(batch) for where in self._in_prompt)

    def of_step(self, batch: TokenBatch, past: Bool[Tensor, "batch past"]) -> list[Edit]:
        """Return the edits of a pass over generated tokens that continues these columns."""
        batch = batch.continuing(past)
        return _present(where(batch) for where in self._after)

    def _split(self, edit: Edit, longest: int) -> tuple[_Where, _Where | None]:
        if edit.positions is not None and edit.scope is not None:
            raise EditError(
                f"{type(edit).__name__} at '{edit.site}' names positions and a scope; give one"
            )
        if edit.positions is not None:
            return self._at_positions(edit, longest)
        if edit.scope is None:
            return (lambda _batch: edit), (lambda _batch: edit)
        scope = Scope.parse(edit.scope)

        def within(batch: TokenBatch) -> Edit | None:
            active = scope.holds(batch.position_ids().cpu(), self._lengths)
            return narrowed(edit, active, batch)

        if scope == Scope.after_prompt():  # every new token: no need to look
            free = replace(edit, scope=None)
            return (lambda _batch: None), (lambda _batch: free)
        return within, (within if scope.generated else None)

    def _at_positions(self, edit: Edit, longest: int) -> tuple[_Where, _Where | None]:
        """Positions count the whole sequence; negative ones count from the prompt's end."""
        rows = rows_of(edit, len(self._prompts))
        given: Any = edit.positions
        given = given.tolist() if hasattr(given, "tolist") else given
        listed: list[Any] = [given] if isinstance(given, int) else list(given)
        shared = not listed or hasattr(listed[0], "__index__")
        per_row: list[list[int]] = [listed] * len(rows) if shared else listed
        if len(per_row) != len(rows):  # refused, with its reason, when the prompts' pass is planned
            return (lambda _batch: edit), None
        lengths = [self._prompts.lengths[row] for row in rows]
        beyond = any(
            position >= length
            for positions, length in zip(per_row, lengths, strict=True)
            for position in positions
        )
        if not beyond:
            return (lambda _batch: edit), None
        wanted: dict[int, Tensor] = {}
        for row, positions, length in zip(rows, per_row, lengths, strict=True):
            places = [p + length if p < 0 else int(p) for p in positions]
            last = length + longest - max(self._prompts.lengths) - 1
            wrong = next((p for p in places if not 0 <= p <= last), None)
            if wrong is not None:
                raise EditError(
                    f"{type(edit).__name__} at '{edit.site}' names position {wrong} of prompt "
                    f"{row}; this generation has positions 0 to {last}"
                )
            wanted[row] = torch.tensor(places)
        free = replace(edit, positions=None)

        def within(batch: TokenBatch) -> Edit | None:
            positions = batch.position_ids().cpu()
            active: Bool[Tensor, "batch pos"] = torch.zeros_like(positions, dtype=torch.bool)
            for row, places in wanted.items():
                active[row] = torch.isin(positions[row], places)
            return narrowed(free, active, batch)

        return within, within

    def _check(self, backend: Backend, reaching: Sequence[Edit]) -> None:
        """Refuse what does not fit the prompts, or one token per row, before anything runs."""
        logits = "all" if self.needs_all_logits else "last"
        plan(backend, self._prompts, edits=self.of_prompt(), logits=logits)
        try:
            plan(backend, _one_token_each(len(self._prompts)), edits=reaching, logits=logits)
        except EditError as error:
            raise EditError(
                f"after the prompt one token is read at a time, and {error}; or give scope='prompt'"
            ) from error


def _one_token_each(n_rows: int) -> TokenBatch:
    past = torch.ones((n_rows, 1), dtype=torch.bool)
    return TokenBatch.from_ids([[0]] * n_rows).continuing(past)


def _check_alone(edit: Edit) -> None:
    """Refuse edits that would need other tokens than the one being read."""
    name = f"{type(edit).__name__} at '{edit.site}'"
    if isinstance(edit, MeanAblate) and edit.mean is None:
        raise EditError(
            f"{name} has no mean over tokens yet to come: give it a mean, or scope='prompt'"
        )
    if isinstance(edit, ResampleAblate):
        raise EditError(f"{name} has no other row to take new tokens from: give scope='prompt'")


def _present(edits: Any) -> list[Edit]:
    return [edit for edit in edits if edit is not None]
