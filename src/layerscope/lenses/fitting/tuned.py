"""The tuned lens's fit: translators, and beside them what a bias alone would do."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.corpus import Corpus, DataConfig, batch_at, n_batches
from layerscope.lenses.fitting.drive import every_tensor, group_of
from layerscope.lenses.fitting.loss import ROWS_AT_ONCE, kl_to_teacher
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.states import States, collect, states_at
from layerscope.lenses.fitting.translators import (
    Basis,
    Parameters,
    at_identity,
    basis_of,
    choose,
    hidden_of,
    in_residuals,
    regressed,
)
from layerscope.models.language_model import LanguageModel

_BETAS, _EPS = (0.9, 0.99), 1e-8  # a fit of a few hundred steps outlives its first gradients
_START_ROWS = 16  # rows of the regression that translators may start from, for each of d_model
_BIAS_PACE = 10.0  # a bias has one entry where a matrix has d_model: alone, it would crawl
_WORTHWHILE = 1e-3  # relative gain of validation KL below which an evaluation counts as none


class TunedSteps:
    """AdamW on the translators of all row indices at once; each is a problem of its own.

    Gradients are clipped per row index, and the best parameters on the validation text are kept per
    row index; step 0 is evaluated too, so none ends worse there than where it started. A loss that
    is not finite ends the fit (`stopped` says where).
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        data: DataConfig,
        options: TunedOptions,
        norm: NormChoice,
    ) -> None:
        options.check(model.d_model)
        self._model, self._corpus, self._data = model, corpus, data
        self._options = options
        self._rates = torch.zeros(model.n_layers)
        self._norm: NormChoice = norm
        self._validation: States | None = None
        self._per_epoch = n_batches(corpus.train, data)
        steps = self._per_epoch * options.epochs
        self._n_steps = steps if options.steps is None else options.steps
        self._every = options.evaluate_every or max(1, self._n_steps // 20)
        self.parameters: dict[str, Parameters] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self.best: dict[str, Parameters] = {}
        self.best_kl: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self._basis: Basis | None = None
        self._idle = 0
        self.stopped: str | None = None

    @property
    def n_steps(self) -> int:
        """Number of optimisation steps."""
        return self._n_steps

    @property
    def note(self) -> str:
        """The latest validation KL."""
        if not self.history:
            return ""
        means = {name: sum(found) / len(found) for name, found in self.history[-1]["bits"].items()}
        return "validation KL " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()) + " bits"

    def step(self, index: int) -> bool:
        """Do one step; False once it is not worth going on, or no longer possible."""
        if not self.parameters:
            self._begin()
        ids, positions = batch_at(
            self._corpus.train,
            self._data,
            index % self._per_epoch,
            epoch=index // self._per_epoch,
        )
        states = states_at(self._model, ids, positions)
        losses = self._losses(states, gradients=True)
        for name, loss in losses.items():
            wrong = (~torch.isfinite(loss)).nonzero().flatten().tolist()
            if wrong:
                self.stopped = (
                    f"the loss of the {name} lens is not finite at step {index}, row "
                    f"{wrong[0]}; the best parameters before it are kept"
                )
                return False
        self._update(index)
        if (index + 1) % self._every == 0 or index + 1 == self.n_steps:
            self._evaluate(index + 1)
            if self._idle >= self._options.patience:
                return False
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return parameters, optimiser state, best parameters and history."""
        named = {
            f"{lens}.{name}": tensor
            for lens, parameters in self.parameters.items()
            for name, tensor in parameters.items()
        }
        best = {
            f"{lens}.{name}": tensor
            for lens, parameters in self.best.items()
            for name, tensor in parameters.items()
        }
        tensors = every_tensor(
            {
                "now": named,
                "first": self._first,
                "second": self._second,
                "best": best,
                "kl": self.best_kl,
                "of": {"rates": self._rates, **self._based().tensors()},
            }
        )
        return tensors, {"history": self.history, "idle": self._idle, "stopped": self.stopped}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a state."""
        device = self._model.unembedding.weight.device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        now, best = group_of(tensors, "now"), group_of(tensors, "best")
        lenses = {name.split(".")[0] for name in now}
        order = [name for name in ("tuned", "bias") if name in lenses]
        self.parameters = {lens: group_of(now, lens) for lens in order}
        self.best = {lens: group_of(best, lens) for lens in order}
        self.best_kl = group_of(tensors, "kl")
        self._first, self._second = group_of(tensors, "first"), group_of(tensors, "second")
        self._rates = tensors["of.rates"]
        self._basis = Basis(tensors["of.scale"], tensors["of.mean"], tensors["of.axes"])
        self.history, self._idle = values["history"], int(values["idle"])
        self.stopped = values["stopped"]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of the best lenses: "tuned", and "bias" where it was trained."""
        basis = self._based()
        return {lens: in_residuals(parameters, basis) for lens, parameters in self.best.items()}

    def validation(self) -> States:
        """Return the states of the validation text, gathered once."""
        if self._validation is None:
            self._validation = collect(self._model, self._corpus.validation, self._data)
        return self._validation

    def _begin(self) -> None:
        options, model = self._options, self._model
        states = self.validation()
        device = states.head.device
        identity = at_identity(model.n_layers, model.d_model, options, seed=self._data.seed)
        self.parameters = {"tuned": {k: v.to(device) for k, v in identity.items()}}
        if options.baseline:
            bias = torch.zeros(model.n_layers, model.d_model, device=device)
            self.parameters["bias"] = {"bias": bias}
        self._evaluate(0)
        if options.start == "regression":
            rows = _START_ROWS * model.d_model
            count = min(self._per_epoch, -(-rows // self._rows_a_batch()))
            parts = (batch_at(self._corpus.train, self._data, index) for index in range(count))
            start = regressed(
                (states_at(model, ids, positions) for ids, positions in parts),
                self._based(),
                self.parameters["tuned"],
            )
            before = self.best_kl["tuned"].clone()
            self.parameters["tuned"] = start
            self._evaluate(0)
            improved = self.best_kl["tuned"] < before
            self.parameters["tuned"] = choose(improved, start, self.best["tuned"])
        self._idle = 0
        self._rates = options.rates(self.best_kl["tuned"], model.d_model)
        for lens, parameters in self.parameters.items():
            for name, tensor in parameters.items():
                self._first[f"{lens}.{name}"] = torch.zeros_like(tensor)
                self._second[f"{lens}.{name}"] = torch.zeros_like(tensor)

    def _based(self) -> Basis:
        if self._basis is None:
            self._basis = basis_of(self.validation().residual[:-1])
        return self._basis

    def _rows_a_batch(self) -> int:
        return self._data.batch * self._data.positions

    def _losses(self, states: States, *, gradients: bool) -> dict[str, Float[Tensor, " layer"]]:
        """Return the loss of every lens per row index; leaves gradients in the parameters."""
        losses: dict[str, Tensor] = {}
        n_rows, basis = states.head.shape[0], self._based()
        with torch.set_grad_enabled(gradients):
            for lens, parameters in self.parameters.items():
                for tensor in parameters.values():
                    tensor.requires_grad_(gradients)
                    tensor.grad = None
                total = torch.zeros(self._model.n_layers, device=states.head.device)
                for first in range(0, n_rows, ROWS_AT_ONCE):  # gradients add up; memory does not
                    rows = slice(first, first + ROWS_AT_ONCE)
                    residual, head = states.residual[:, rows], states.head[rows]
                    hidden = hidden_of(self._model, residual, parameters, basis, self._norm)
                    loss = kl_to_teacher(hidden, head, self._model.unembedding)
                    loss = loss * (head.shape[0] / n_rows)
                    if gradients and bool(torch.isfinite(loss).all()):
                        loss.sum().backward()
                    total += loss.detach()
                losses[lens] = total
        return losses

    @torch.no_grad()
    def _update(self, index: int) -> None:
        options = self._options
        rates = self._rates * schedule(index, self.n_steps, options.warmup)
        for lens, parameters in self.parameters.items():
            # In one order, whether or not a checkpoint was read: sums round by their order.
            found = {name: parameters[name].grad for name in sorted(parameters)}
            gradients = {name: grad for name, grad in found.items() if grad is not None}
            square = torch.stack(
                [
                    gradient.flatten(1).square().sum(1) if gradient.ndim > 1 else gradient.square()
                    for gradient in gradients.values()
                ]
            ).sum(0)
            shrink = (options.clip / square.sqrt().clamp_min(1e-12)).clamp_max(1.0)
            for name, gradient in gradients.items():
                tensor = parameters[name].requires_grad_(False)
                key = f"{lens}.{name}"
                shape = (-1, *[1] * (gradient.ndim - 1))
                gradient, rate = gradient * shrink.view(shape), rates.view(shape)
                first = self._first[key].lerp_(gradient, 1 - _BETAS[0])
                second = (
                    self._second[key]
                    .mul_(_BETAS[1])
                    .addcmul_(gradient, gradient, value=1 - _BETAS[1])
                )
                first_hat = first / (1 - _BETAS[0] ** (index + 1))
                second_hat = second / (1 - _BETAS[1] ** (index + 1))
                if name not in ("bias", "log_inverse"):
                    tensor.mul_(1 - rate * options.weight_decay)
                pace = rate * (_BIAS_PACE if name == "bias" else 1.0)
                tensor.sub_(pace * first_hat / (second_hat.sqrt() + _EPS))
                tensor.grad = None

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Measure all lenses on the validation text, and keep what is better than before."""
        found = self._losses(self.validation(), gradients=False)
        better = False
        for lens, loss in found.items():
            now = {name: tensor.clone() for name, tensor in self.parameters[lens].items()}
            loss = torch.where(torch.isfinite(loss), loss, torch.full_like(loss, math.inf))
            if lens not in self.best:
                self.best[lens], self.best_kl[lens] = now, loss
                better = True
                continue
            before = self.best_kl[lens]
            self.best[lens] = choose(loss < before, now, self.best[lens])
            self.best_kl[lens] = torch.minimum(loss, before)
            if lens == "tuned":
                better = bool((loss < before * (1 - _WORTHWHILE)).any())
        self._idle = 0 if better else self._idle + 1
        bits = {lens: (loss / math.log(2.0)).tolist() for lens, loss in found.items()}
        self.history.append({"step": step, "bits": bits})


def schedule(index: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rate: linear warm-up, then a cosine to zero."""
    first = max(1, round(steps * warmup))
    if index < first:
        return (index + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (index - first) / max(1, steps - first)))
