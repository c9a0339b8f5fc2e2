"""What every backend's passes share: whose pass this thread is in, and how an edit acts on a value.

Taps act only in the run that installed them: a run nested in an edit's function, a run in another
thread, or a call of the model by its owner passes through them untouched.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from layerscope.errors import EditError
from layerscope.models.edits import Apply, EditContext, put, take
from layerscope.models.run import PlannedEdit, RunPlan

_running: ContextVar[object | None] = ContextVar("layerscope_run", default=None)


class Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no handler in between swallows it."""


@contextmanager
def running(run: object) -> Generator[None]:
    """Make the hooks of `run`, and of no other, act in this thread."""
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)


def current_run() -> object | None:
    """Return the run whose forward pass this thread is in, or None."""
    return _running.get()


@contextmanager
def outside() -> Generator[None]:
    """Let nothing of the surrounding run act: for calls of a user's function."""
    with running(None):
        yield


def edited_value(value: Tensor, planned: PlannedEdit, plan: RunPlan) -> Tensor:
    """Return a site's value with one edit applied to its selected rows and columns."""
    axis = planned.site.pos_axis
    everything = planned.rows is None or planned.columns is None
    if planned.rows is None or planned.columns is None:
        rows = torch.arange(value.shape[0], device=value.device)
        columns = torch.arange(value.shape[axis], device=value.device).expand(value.shape[0], -1)
        selected = value
    else:
        rows = planned.rows.to(value.device)
        columns = planned.columns.to(value.device)
        selected = take(value, rows, columns, axis)
    mask = plan.batch.attention_mask.to(value.device)
    if not everything:
        mask = mask[rows[:, None], columns]
    context = EditContext(planned.site, plan.batch, rows, columns, mask, value)
    if isinstance(planned.edit, Apply):
        with outside():
            edited = planned.edit.transform(selected, context)
    else:
        edited = planned.edit.transform(selected, context)
    if edited.shape != selected.shape:
        raise EditError(
            f"{type(planned.edit).__name__} at '{planned.site}' gave shape {list(edited.shape)}; "
            f"it must keep {list(selected.shape)}"
        )
    edited = edited.to(value.device, value.dtype)
    return edited if everything else put(value, rows, columns, edited, axis)
