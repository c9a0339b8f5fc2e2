"""Which tokens an edit acts on, told by their place in the prompt and after it.

A scope means the same set of tokens however the sequence is read: in one pass, or a prompt first
and then token by token. In a run without generation every token belongs to the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from layerscope.errors import EditError, nearest
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import Apply, Edit, EditContext, rows_of


@dataclass(frozen=True)
class Scope:
    """A set of tokens of every row; make one with `all`, `prompt`, `after_prompt`, ...

    Attributes:
        in_prompt: whether tokens of the prompt belong to it.
        generated: whether generated tokens do.
        last: of the prompt, only so many last tokens; None for all.
        first: only positions from this one on, counted from the start of the row.
        since: of the generated tokens, only those from this one on, counted from 0.
        until: of the generated tokens, only those before this one; None for no end.
    """

    in_prompt: bool = True
    generated: bool = True
    last: int | None = None
    first: int = 0
    since: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise EditError(f"a scope of the last {self.last} tokens is empty; use 1 or more")
        if self.first < 0:
            raise EditError(
                f"a scope cannot begin at position {self.first}: count from the start, or use "
                f"last_k({-self.first})"
            )
        if self.since < 0 or (self.until is not None and self.until <= self.since):
            raise EditError(
                f"a scope of generated tokens {self.since} to {self.until} is empty: they count "
                "from 0, and the end is not among them"
            )

    @classmethod
    def all(cls) -> Scope:
        """Return the scope of every token."""
        return cls()

    @classmethod
    def prompt(cls) -> Scope:
        """Return the scope of the prompt's tokens: what is read before the first new token."""
        return cls(generated=False)

    @classmethod
    def after_prompt(cls) -> Scope:
        """Return the scope of the generated tokens."""
        return cls(in_prompt=False)

    @classmethod
    def last_k(cls, k: int, *, prefill_only: bool = False) -> Scope:
        """Return the scope of the prompt's last `k` tokens and every generated one.

        So acts a hook that writes to ``[:, -k:]`` of every pass. A shorter prompt counts whole.
        """
        return cls(last=k, generated=not prefill_only)

    @classmethod
    def from_position(cls, position: int, *, prefill_only: bool = False) -> Scope:
        """Return the scope of all tokens from a position on, counted from 0 without padding."""
        return cls(first=position, generated=not prefill_only)

    @classmethod
    def steps(cls, since: int, until: int | None = None) -> Scope:
        """Return the scope of generated tokens from one on, up to but without another.

        Token 0 is the first generated one; what is added while it is read changes the second.
        """
        return cls(in_prompt=False, since=since, until=until)

    @classmethod
    def parse(cls, name: str | Scope) -> Scope:
        """Return the scope of a name: ``all``, ``prompt``, ``after_prompt``, ``prefill_only``...

        ``last_k:3`` and ``from_position:5`` take a number, ``steps:0:8`` two. ``prefill_only`` is
        ``prompt``.

        Raises:
            EditError: there is no such scope.
        """
        if isinstance(name, Scope):
            return name
        plain = {
            "all": cls(),
            "prompt": cls.prompt(),
            "prefill_only": cls.prompt(),
            "after_prompt": cls.after_prompt(),
        }
        numbered = re.fullmatch(r"(last_k|from_position):(\d+)", name)
        if numbered:
            return getattr(cls, numbered[1])(int(numbered[2]))
        between = re.fullmatch(r"steps:(\d+):(\d*)", name)
        if between:
            return cls.steps(int(between[1]), int(between[2]) if between[2] else None)
        if name not in plain:
            known = [*plain, "last_k:K", "from_position:P", "steps:A:B"]
            raise EditError(f"unknown scope '{name}'{nearest(name, known)}; use {', '.join(known)}")
        return plain[name]

    def __str__(self) -> str:
        """Return a short account for provenance."""
        parts = ["prompt"] if self.in_prompt else []
        if self.last is not None and self.in_prompt:
            parts = [f"last {self.last} of prompt"]
        if self.generated:
            end = "" if self.until is None else f" before {self.until}"
            parts.append("generated" + (f" from {self.since}" if self.since else "") + end)
        start = f" from position {self.first}" if self.first else ""
        return " and ".join(parts) + start

    def holds(
        self, positions: Int[Tensor, "batch pos"], prompt_lengths: Int[Tensor, " batch"]
    ) -> Bool[Tensor, "batch pos"]:
        """Return True at the positions (of the unpadded rows) that belong to the scope."""
        lengths = prompt_lengths[:, None]
        prompt = positions < lengths
        generated = ~prompt & self.generated & (positions >= lengths + self.since)
        if self.until is not None:
            generated &= positions < lengths + self.until
        chosen = (prompt & self.in_prompt) | generated
        if self.last is not None:
            chosen &= positions >= lengths - self.last
        return chosen & (positions >= self.first)


def scoped(
    edits: Sequence[Edit], batch: TokenBatch, prompt_lengths: Sequence[int] | None = None
) -> list[Edit]:
    """Return the edits of one pass, without scopes: those that act nowhere in it are left out.

    `prompt_lengths` counts the real tokens of each row's prompt; None: everything is prompt.

    Raises:
        EditError: an edit names positions and a scope.
    """
    if all(getattr(edit, "scope", None) is None for edit in edits):
        return list(edits)
    places = batch.position_ids()
    if prompt_lengths is None:
        lengths = places.amax(dim=1) + 1
    else:
        lengths = torch.tensor(list(prompt_lengths), device=places.device)
    result: list[Edit | None] = []
    for edit in edits:
        scope: Any = getattr(edit, "scope", None)
        if scope is None:
            result.append(edit)
            continue
        if edit.positions is not None:
            raise EditError(
                f"{type(edit).__name__} at '{edit.site}' names positions and a scope; give one"
            )
        result.append(narrowed(edit, Scope.parse(scope).holds(places, lengths), batch))
    return [edit for edit in result if edit is not None]


def narrowed(edit: Edit, active: Bool[Tensor, "batch pos"], batch: TokenBatch) -> Edit | None:
    """Return the edit acting at True alone, among its rows; None when there is no such place."""
    edit = replace(edit, scope=None)
    rows = rows_of(edit, len(batch))
    real = batch.attention_mask[rows].to(active.device)
    chosen = active[rows] & real
    if not bool(chosen.any()):
        return None
    return edit if torch.equal(chosen, real) else _Within.of(edit, active)


@dataclass(frozen=True, eq=False)
class _Within(Apply):
    """An edit whose result is used at some places only; to backends, the edit of a function."""

    edit: Edit

    @classmethod
    def of(cls, edit: Edit, active: Bool[Tensor, "batch pos"]) -> _Within:
        def narrow(values: Tensor, context: EditContext) -> Tensor:
            keep = active.to(values.device)[context.rows[:, None], context.columns]
            inside = replace(context, mask=context.mask & keep)
            edited = edit.transform(values, inside)
            axis = context.site.pos_axis
            keep = keep.view(
                keep.shape[0], *[1] * (axis - 1), keep.shape[1], *[1] * (values.ndim - axis - 1)
            )
            return torch.where(keep, edited.to(values.device, values.dtype), values)

        return cls(edit.site, narrow, edit, rows=edit.rows)

    def check(self, shape: Sequence[int]) -> None:
        """Raise what the edit itself raises."""
        self.edit.check(shape)

    def describe(self) -> dict[str, Any]:
        """Return the account of the edit itself."""
        return self.edit.describe()
