"""The state of one run: what has fired, what was edited, and what was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.views import Carried, View, Whole
from layerscope.models.backends.recording import edited_value
from layerscope.models.edits import take
from layerscope.models.run import PlannedCapture, PlannedEdit, RunPlan
from layerscope.models.sites import Site


@dataclass(frozen=True)
class Carrier:
    """An array that a module reads or gives, where a tap can reach it.

    Attributes:
        name: dotted name of the module.
        side: "input" or "output" of the module, or what its attention kernel reads and computes.
        shared: an edit must also reach others who hold the same array (the skip connection), so it
            is written in place.
    """

    name: str
    side: Literal["input", "output", "query", "key", "value", "scores", "pattern"]
    shared: bool = False


@dataclass(frozen=True)
class Point:
    """Where a site lives: on a carrier, seen through a view."""

    carrier: Carrier
    view: View = field(default_factory=Whole)


class Recorder:
    """Edits and keeps the values of one run, as tensors in the caller's columns."""

    def __init__(self, plan: RunPlan, points: Callable[[Site], Point]) -> None:
        self.plan = plan
        self.activations: dict[Site, Tensor] = {}
        self._fired: set[Carrier] = set()
        self._edits: dict[Carrier, list[tuple[PlannedEdit, View]]] = {}
        self._captures: dict[Carrier, list[tuple[PlannedCapture, View]]] = {}
        self._sites: dict[Carrier, list[Site]] = {}
        for edit in plan.edits:
            point = points(edit.site)
            self._edits.setdefault(point.carrier, []).append((edit, point.view))
            self._sites.setdefault(point.carrier, []).append(edit.site)
        for capture in plan.captures:
            point = points(capture.site)
            self._captures.setdefault(point.carrier, []).append((capture, point.view))
            self._sites.setdefault(point.carrier, []).append(capture.site)

    @property
    def carriers(self) -> list[Carrier]:
        """Every carrier that this run reads or edits."""
        return list(self._sites)

    def wants(self, carrier: Carrier) -> bool:
        """Return True when the run reads or edits what this carrier holds."""
        return carrier in self._sites

    def visit(self, carrier: Carrier, value: Tensor, source: Tensor | None = None) -> Tensor:
        """Edit what a module carries and keep what is wanted; return what the model goes on with.

        Edits of sites that lie in one array (a head, all heads) act in the order of the run. The
        given tensor itself comes back where nothing was edited.
        """
        self._fired.add(carrier)
        n_rows = len(self.plan.batch)
        for planned, view in self._edits.get(carrier, ()):
            carried = Carried(value, source, n_rows)
            site_value = view.read(carried)
            edited = edited_value(site_value, planned, self.plan)
            if edited is not site_value:
                value = view.write(carried, edited)
        carried = Carried(value, source, n_rows)
        for capture, view in self._captures.get(carrier, ()):
            self._keep(capture, view.read(carried))
        return value

    def finish(self) -> dict[Site, Tensor]:
        """Return the activations.

        Raises:
            ModelError: a site never fired.
        """
        silent = [
            str(site)
            for carrier, sites in self._sites.items()
            if carrier not in self._fired
            for site in dict.fromkeys(sites)
        ]
        if silent:
            raise ModelError(
                f"the forward pass never reached {', '.join(silent)}; this model does not call "
                "those modules, so run `layerscope check` on it"
            )
        return self.activations

    def _keep(self, capture: PlannedCapture, value: Tensor) -> None:
        if capture.columns is not None:
            rows = torch.arange(value.shape[0])
            value = take(value, rows, capture.columns.cpu(), capture.site.pos_axis)
        device = value.device if capture.device is None else capture.device
        dtype = value.dtype if capture.dtype is None else capture.dtype
        self.activations[capture.site] = value.to(device=device, dtype=dtype)
