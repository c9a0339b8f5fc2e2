"""The optimisation itself: a dictionary fitted to activations that are in memory.

An autoencoder explains what it reads, a transcoder what the MLP behind it writes.

BatchTopK follows Bussmann et al. (2024), with the auxiliary loss of Gao et al. (2024) for dead
features; JumpReLU follows Rajamanoharan et al. (2024), its thresholds trained through a rectangle
estimator towards a wanted L0. Affine transcoders follow Paulo et al. (2025).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import JumpRelu
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.formats.base import Raw
from layerscope.features.matrices import Matrix
from layerscope.features.training.options import TrainOptions
from layerscope.models.sites import Site

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_CALIBRATION_ROWS = 16_384
_MEAN_ROWS = 65_536
_START = 0.3  # length of encoder rows before training


class Trainer:
    """Trains one dictionary; its whole state is a few tensors, so that it can be stopped anywhere.

    Args:
        x: [rows, d] activations in float32, in memory.
        site: where they come from.
        options: see `TrainOptions`.
        y: [rows, d_out] of the MLP behind `site`, for a transcoder; None for an autoencoder.

    Raises:
        DictionaryError: there are too few activations, they are not finite, or those of a
            transcoder's two sites do not go together.
        ConfigError: a transcoder cannot read this site.
    """

    def __init__(
        self,
        x: Float[Tensor, "rows d"],
        site: Site,
        options: TrainOptions,
        *,
        y: Float[Tensor, "rows d_out"] | None = None,
    ) -> None:
        if len(x) < options.batch:
            raise DictionaryError(
                f"{len(x):,} activations are fewer than one batch of {options.batch:,}; give more "
                "text, or a smaller batch"
            )
        self.target = options.target(site)
        if (y is not None) != options.transcoder or (y is not None and len(y) != len(x)):
            raise DictionaryError(
                "a transcoder needs as many activations of mlp_out as of mlp_in, an autoencoder "
                "those of its site alone"
            )
        for where, values in ((site, x), (self.target, y)):
            if values is not None and not bool(values.isfinite().all()):
                raise DictionaryError(f"activations of {where} are not finite")
        self.x, self.y, self.site, self.options = x, x if y is None else y, site, options
        self.scale, self.output_scale = _scale(self.x), _scale(self.y)
        # An autoencoder subtracts the bias that it trains; what a transcoder reads is only centred.
        self.center = None if y is None else x[:_MEAN_ROWS].mean(dim=0) * self.scale
        self.note = ""
        self._init()

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return self.options.steps

    def step(self, index: int) -> bool:
        """Do one step; the same for the same index, state and activations."""
        options = self.options
        rows = torch.randint(len(self.x), (options.batch,), generator=self._generator(index))
        x, y = self.x[rows] * self.scale, self.y[rows] * self.output_scale
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        loss, fvu, fired, l0 = self._loss(x, y, index)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        with torch.no_grad():
            self._update(dict(zip(self.parameters, gradients, strict=True)), index)
            self.silent = torch.where(fired, 0, self.silent + options.batch)
        dead = float((self.silent > options.dead_after).float().mean())
        self.note = f"FVU {fvu:.3f}, L0 {l0:.1f}, dead {dead:.1%}"
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on."""
        tensors = {f"parameter.{name}": p for name, p in self.parameters.items()}
        tensors |= {f"first.{name}": p for name, p in self.first.items()}
        tensors |= {f"second.{name}": p for name, p in self.second.items()}
        return {**tensors, "silent": self.silent}, {}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a state."""
        del values
        for group, target in (
            ("parameter", self.parameters),
            ("first", self.first),
            ("second", self.second),
        ):
            for name in target:
                target[name] = tensors[f"{group}.{name}"].clone()
        self.silent = tensors["silent"].clone()

    @torch.no_grad()
    def dictionary(self, *, model_name: str | None = None) -> SparseDictionary:
        """Return the dictionary in raw units, with a unit-norm decoder and a threshold."""
        p = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if self.options.kind == "jumprelu":
            threshold, words = p["log_threshold"].exp(), "per feature, trained"
        else:
            kept = self._calibrate()
            threshold = torch.full_like(p["b_enc"], kept)
            words = "calibrated to the k of batch topk"
        b_enc, b_dec, skip = p["b_enc"], p["b_dec"], p.get("W_skip")
        if self.center is not None:  # centring becomes part of the biases
            b_enc = b_enc - p["W_enc"] @ self.center
            b_dec = b_dec if skip is None else b_dec - skip @ self.center
        raw = Raw(
            format="layerscope",
            reads=self.site,
            writes=(self.target,),
            encoder=Matrix.of("W_enc", p["W_enc"].clone()),
            decoders=(Matrix.of("W_dec", p["W_dec"].clone()),),
            b_enc=b_enc,
            b_dec=b_dec,
            gate=JumpRelu(threshold, words=words),
            pre_bias=self.center is None,
            input_scale=self.scale,
            output_scale=self.output_scale,
            skip=skip,
            units="unit",
            facts={"model_name": model_name, "k": self.options.k},
        )
        return raw.fold().load()

    def _init(self) -> None:
        d, d_out, options = self.x.shape[1], self.y.shape[1], self.options
        n = options.features(d)
        generator = self._generator(-1)
        mean = self.y[:_MEAN_ROWS].mean(dim=0) * self.output_scale
        noise = torch.randn(n, d, generator=generator)
        # Half of each start is the direction of a real token: fewer features begin dead.
        rows = torch.randint(len(self.x), (n,), generator=generator)
        center = mean if self.center is None else self.center
        reads = _unit(_unit(noise) + _unit(self.x[rows] * self.scale - center))
        writes = reads
        if self.center is not None:  # what the MLP wrote at the same token
            noise = torch.randn(n, d_out, generator=generator)
            writes = _unit(_unit(noise) + _unit(self.y[rows] * self.output_scale - mean))
        self.parameters = {
            # Overcomplete directions overlap: at full length they would write all many times over.
            "W_enc": _START * reads,
            "b_enc": torch.zeros(n),
            "W_dec": writes,
            "b_dec": mean,
        }
        if options.affine:
            self.parameters["W_skip"] = torch.zeros(d_out, d)
        if options.kind == "jumprelu":
            self.parameters["log_threshold"] = torch.full((n,), math.log(0.5))
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.silent = torch.zeros(n, dtype=torch.int64)
        sample = self.y[:_MEAN_ROWS] * self.output_scale
        self._variance = max(float((sample - mean).square().sum(dim=1).mean()), 1e-12)

    def _generator(self, index: int) -> torch.Generator:
        words = f"{self.options.seed} {self.site} {index}".encode()
        seed = int.from_bytes(hashlib.blake2b(words, digest_size=6).digest(), "big")
        return torch.Generator().manual_seed(seed)

    def _loss(self, x: Tensor, y: Tensor, index: int) -> tuple[Tensor, float, Tensor, float]:
        p, options = self.parameters, self.options
        inner = x - (p["b_dec"] if self.center is None else self.center)
        pre = torch.addmm(p["b_enc"], inner, p["W_enc"].T)
        penalty = x.new_zeros(())
        if options.kind == "jumprelu":
            threshold = p["log_threshold"].exp()
            values = _Jump.apply(pre, threshold, options.bandwidth)
            l0 = _Count.apply(pre, threshold, options.bandwidth).sum(dim=1).mean()
            warm = min(1.0, (index + 1) / (0.2 * options.steps))
            penalty = options.sparsity * warm * (l0 / options.k - 1).square()
        else:
            positive = pre.relu()
            values = torch.where(positive.detach() >= self._kth(positive.detach()), positive, 0.0)
        assert isinstance(values, Tensor)
        error = y - torch.addmm(p["b_dec"], values, p["W_dec"])
        if "W_skip" in p:
            error = error - inner @ p["W_skip"].T
        fvu = error.square().sum(dim=1).mean() / self._variance
        active = values.detach() > 0
        loss = fvu + penalty + options.revive * self._revival(pre, error.detach())
        return loss, float(fvu.detach()), active.any(dim=0), float(active.sum() / len(x))

    def _kth(self, positive: Tensor) -> Tensor:
        """Return the smallest value that is among the k * batch largest, and positive."""
        flat = positive.flatten()
        kept = min(self.options.k * len(positive), flat.numel())
        return flat.kthvalue(flat.numel() - kept + 1).values.clamp_min(1e-30)

    def _revival(self, pre: Tensor, error: Tensor) -> Tensor:
        """Return how badly the dead features explain what the others leave, 0 to about 1."""
        dead = (self.silent > self.options.dead_after).nonzero().flatten()
        if not len(dead):
            return pre.new_zeros(())
        some = min(len(dead), pre.shape[1], max(1, error.shape[1] // 2))
        positive = pre[:, dead].relu()
        best = positive.detach().topk(some, dim=1, sorted=False).indices
        kept = torch.zeros_like(positive, dtype=torch.bool).scatter_(1, best, True)
        values = torch.where(kept, positive, 0.0)
        left = error - values @ self.parameters["W_dec"][dead]
        return left.square().sum() / error.square().sum().clamp_min(1e-12)

    def _update(self, gradients: dict[str, Tensor], index: int) -> None:
        """Adam, on decoder rows that stay on the unit sphere."""
        rows = self.parameters["W_dec"]
        along = (gradients["W_dec"] * rows).sum(dim=1, keepdim=True)
        gradients["W_dec"] = gradients["W_dec"] - along * rows
        rate = self.options.learning_rate * _rate(index, self.options.steps)
        one, two = _BETAS
        for name, gradient in gradients.items():
            first, second = self.first[name], self.second[name]
            first.mul_(one).add_(gradient, alpha=1 - one)
            second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            size = (second / (1 - two ** (index + 1))).sqrt_().add_(_EPSILON)
            parameter = self.parameters[name].detach()
            parameter.addcdiv_(first, size, value=-rate / (1 - one ** (index + 1)))
            self.parameters[name] = parameter
        self.parameters["W_dec"] = _unit(self.parameters["W_dec"])

    def _calibrate(self) -> float:
        """Return the threshold at which k features are active on average."""
        p, k = self.parameters, self.options.k
        rows = min(_CALIBRATION_ROWS, len(self.x))
        chosen = torch.randperm(len(self.x), generator=self._generator(-2))[:rows]
        largest: list[Tensor] = []
        for part in chosen.split(2048):
            x = self.x[part] * self.scale - (p["b_dec"] if self.center is None else self.center)
            pre = torch.addmm(p["b_enc"], x, p["W_enc"].T).relu()
            largest.append(pre.topk(min(8 * k, pre.shape[1]), dim=1, sorted=False).values.flatten())
        values = torch.cat(largest)
        kept = min(k * rows, values.numel() - 1)
        # Between the last value kept and the first one dropped.
        return float(values.kthvalue(values.numel() - kept).values.clamp_min(0))


def _scale(values: Float[Tensor, "rows d"]) -> float:
    """Return what makes the mean norm of rows the square root of their width."""
    return math.sqrt(values.shape[1]) / max(float(values.norm(dim=1).mean()), 1e-12)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _rate(index: int, steps: int) -> float:
    done = (index + 1) / steps
    return min(1.0, done / 0.05, max(0.0, (1 - done + 1 / steps) / 0.3))


class _Jump(torch.autograd.Function):
    """pre * 1[pre > threshold], with a rectangle in place of the derivative of the step."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype)
        to_threshold = -(threshold / ctx.width) * (near * gradient).sum(dim=0)
        return torch.where(pre > threshold, gradient, 0.0), to_threshold, None


class _Count(torch.autograd.Function):
    """1[pre > threshold], with the same rectangle."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype)
        return None, -(near * gradient).sum(dim=0) / ctx.width, None
