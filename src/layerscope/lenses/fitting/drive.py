"""Steps that survive a kill: the loop that every fit runs in, its checkpoint and its progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from layerscope.errors import LensError
from layerscope.files import atomic_path, canonical_json, sha256_text

CHECKPOINT = "fit.checkpoint.safetensors"
_STATES = 2  # counts changes of what fits keep: a checkpoint of another is of another fit


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step, steps: done, and in all.
        seconds: since this process began the fit.
        eta: seconds left at the pace so far; None before the first step.
        note: the latest figure, such as the validation KL in bits.
    """

    step: int
    steps: int
    seconds: float
    eta: float | None
    note: str


class Steps(Protocol):
    """A fit as numbered steps whose whole state is a few tensors and a JSON value."""

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        ...

    @property
    def note(self) -> str:
        """The latest figure, for the progress display."""
        ...

    def step(self, index: int) -> bool:
        """Do one step; return False to stop early."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on."""
        ...

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a state."""
        ...


def drive(
    steps: Steps,
    *,
    folder: Path | None,
    key: dict[str, Any],
    every: float = 20.0,
    progress: Callable[[Progress], object] | None = None,
) -> int:
    """Run all steps, from the checkpoint where there is one; return how many it found done.

    Args:
        steps: the fit.
        folder: where the checkpoint is kept; None for none.
        key: what decides the result (data, model, options); a checkpoint of another key is refused.
        every: least seconds between checkpoints; 0 for one after every step.
        progress: called after every step.

    Raises:
        LensError: the checkpoint is of another fit, or damaged.
    """
    name = sha256_text(canonical_json({"states": _STATES, **key}))
    path = None if folder is None else folder / CHECKPOINT
    first = 0
    if path is not None and path.exists():
        tensors, values = _read(path, name)
        first = int(values["step"])
        steps.restore(tensors, values["state"])
    started = saved = time.monotonic()
    for index in range(first, steps.n_steps):
        go_on = steps.step(index)
        now = time.monotonic()
        done = index + 1
        if path is not None and (now - saved >= every or not go_on):
            _write(path, name, steps, done if go_on else steps.n_steps)
            saved = time.monotonic()
        if progress is not None:
            pace = (now - started) / (done - first)
            eta = pace * (steps.n_steps - done) if go_on else 0.0
            progress(Progress(done, steps.n_steps, now - started, eta, steps.note))
        if not go_on:
            break
    return first


def forget(folder: Path) -> None:
    """Remove the checkpoint of a fit that is complete."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def _write(path: Path, key: str, steps: Steps, done: int) -> None:
    from safetensors.torch import save_file

    tensors, values = steps.state()
    meta = {"key": key, "step": done, "state": values}
    with atomic_path(path) as temporary:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # NaN is written as it is: a history may hold one, and must come back equal.
        save_file(kept, temporary, metadata={"fit": json.dumps(meta)})


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            meta = json.loads((stored.metadata() or {})["fit"])
            tensors: dict[str, Tensor] = {
                name: stored.get_tensor(name).clone()
                for name in stored.keys()  # noqa: SIM118
            }
    except (SafetensorError, KeyError, ValueError) as error:
        raise LensError(f"{path} is damaged; remove it to start the fit anew") from error
    if meta["key"] != key:
        raise LensError(
            f"{path} is the checkpoint of a fit with other settings, text or model; finish that "
            "one, remove the file, or choose another folder"
        )
    return tensors, meta


def every_tensor(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Flatten named groups of tensors into one dictionary with dotted names."""
    return {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def group_of(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Return one group of what `every_tensor` flattened."""
    prefix = f"{group}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def first_nonfinite(values: Tensor) -> int | None:
    """Return the index of the first entry that is NaN or infinite, None if all are finite."""
    wrong = (~torch.isfinite(values)).nonzero()
    return None if not len(wrong) else int(wrong[0, 0])
