"""Steering operations beyond the plain edits: adding at constant length, and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.models import Add, Apply, Edit, EditContext, Scope


@dataclass(frozen=True, eq=False)
class AddKeepingNorm(Apply):
    """Add, then bring every residual back to the length it had; make one with `of`.

    To backends it is the edit of a function.
    """

    add: Add

    @classmethod
    def of(cls, site: str, value: Tensor, coefficient: float = 1.0, **where: Any) -> AddKeepingNorm:
        """Return the edit of a vector; `where` holds rows, positions or scope, as of `Add`."""
        add = Add(site, value, coefficient)

        def function(values: Tensor, context: EditContext) -> Tensor:
            moved = add.transform(values, context)
            before = values.float().norm(dim=-1, keepdim=True)
            after = moved.float().norm(dim=-1, keepdim=True)
            factor = torch.where(after > 0, before / after, torch.ones_like(after))
            return moved * factor.to(moved.dtype)

        return cls(site, function, add, **where)

    def check(self, shape: Sequence[int]) -> None:
        """Raise EditError unless the vector broadcasts over the selection."""
        self.add.check(shape)

    def describe(self) -> dict[str, Any]:
        """Return the account of the addition, and that lengths are kept."""
        own = {name: getattr(self, name) for name in ("rows", "positions", "scope")}
        kept = {name: None if value is None else str(value) for name, value in own.items()}
        return {**self.add.describe(), **kept, "edit": "AddKeepingNorm"}


def scheduled(
    edit: Add | AddKeepingNorm, strengths: Sequence[float], *, prompt: float = 0.0
) -> list[Edit]:
    """Return edits that change their strength from one generated token to the next.

    Args:
        edit: what is added at strength 1, without a scope.
        strengths: what multiplies it while generated token 0, 1, ... is read; the last one stays.
        prompt: what multiplies it at the tokens of the prompt.

    Raises:
        ConfigError: there is no strength, or the edit has positions or a scope of its own.
    """
    if not strengths:
        raise ConfigError("a schedule needs a strength for the first generated token")
    if edit.scope is not None or edit.positions is not None:
        raise ConfigError("a schedule says where to act: leave out the edit's scope and positions")
    stages: list[tuple[float, Scope]] = [(prompt, Scope.prompt())]
    begin = 0
    for step, strength in enumerate(strengths):
        last = step + 1 == len(strengths)
        if last or strengths[step + 1] != strength:
            stages.append((strength, Scope.steps(begin, None if last else step + 1)))
            begin = step + 1
    return [_times(edit, strength, scope) for strength, scope in stages if strength != 0.0]


def _times(edit: Add | AddKeepingNorm, strength: float, scope: Scope) -> Edit:
    if isinstance(edit, Add):
        return replace(edit, coefficient=edit.coefficient * strength, scope=scope)
    add = edit.add
    return AddKeepingNorm.of(
        str(edit.site), add.value, add.coefficient * strength, rows=edit.rows, scope=scope
    )
