"""A sparse dictionary in the raw units of the model, whatever its file looked like.

All conventions are folded into the weights once, when it is loaded, so that for one token x [d_in]

    pre = R (x - c) + b          R: read rows [n, d_in], c: what is subtracted first, or nothing
    f = gate(pre)                f: feature values [n], zero or positive
    y = f D + b_dec (+ x W_skip^T)    D: write directions [n, d_out]

hold as they stand. Only normalisation per token (layer norm, unit norm) cannot be folded; it is
done as the file says, and directions then depend on the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate
from layerscope.features.conventions import Convention
from layerscope.features.matrices import Ids, Matrix, indices
from layerscope.features.spaces import FeatureId, FeatureSpace
from layerscope.features.token_norms import TokenNorm
from layerscope.models.language_model import LanguageModel
from layerscope.models.sites import Site

_SLICE = 8192  # rows of a matrix of another dtype that are converted at once


class SparseDictionary:
    """Features of one site: encode, decode, and where they read and write.

    Attributes:
        reads: the site whose activations are encoded.
        writes: the sites that are reconstructed: one, or for a cross-layer transcoder one per layer
            from its own on. An autoencoder writes where it reads.
        encoder: read rows, [n, d_in].
        decoders: write directions, [n, d_out] for every site of `writes`.
        gate: from pre-activations to feature values.
        center: [d_in] what is subtracted before encoding; None for nothing.
        bias: [n] added to ``R (x - center)``.
        decoder_bias: [d_out] added to what is written to ``writes[0]``.
        skip: [d_out, d_in] of a skip transcoder.
        token_norm: normalisation per token, where there is one.
        facts: what the file says beside: model, k, source, expected L0; JSON-able.
        details: the convention, field by field.
        space: the feature space of this dictionary; replaced by that of its set.
    """

    def __init__(
        self,
        *,
        reads: Site,
        writes: Sequence[Site],
        encoder: Matrix,
        decoders: Sequence[Matrix],
        gate: Gate,
        bias: Float[Tensor, " n"],
        decoder_bias: Float[Tensor, " d_out"],
        center: Float[Tensor, " d_in"] | None = None,
        skip: Float[Tensor, "d_out d_in"] | None = None,
        token_norm: TokenNorm | None = None,
        convention: Convention | None = None,
        facts: Mapping[str, Any] | None = None,
        space: str = "",
    ) -> None:
        self.reads = reads
        self.writes = tuple(writes)
        self.encoder = encoder
        self.decoders = tuple(decoders)
        self.gate = gate
        self.bias = bias
        self.decoder_bias = decoder_bias
        self.center = center if center is not None and bool(center.any()) else None
        self.skip = skip
        self.token_norm = token_norm
        self.details = convention or Convention(gate=gate.describe())
        self.facts = dict(facts or {})
        layer = 0 if reads.layer is None else reads.layer
        name = space or f"dictionary:{reads.kind}"
        self.layer = layer
        self.space = FeatureSpace(name, ((layer, encoder.shape[0]),))
        self._check()

    def __repr__(self) -> str:
        return f"SparseDictionary({self.n_features} features, {self.convention})"

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of what is encoded; heads are flattened."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of what is written."""
        return self.decoders[0].shape[1]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it writes where it reads, so that its error is ``x - reconstruct(x)``."""
        return self.writes == (self.reads,)

    @property
    def convention(self) -> str:
        """How the file was read, in one line."""
        first, last = self.writes[0], self.writes[-1]
        written = str(first) if first == last else f"{first} to {last}"
        return f"{self.details.line()} | reads {self.reads} | writes {written}"

    def id(self, feature_id: int) -> FeatureId:
        """Return the typed id of a feature; raises DictionaryError if there is none."""
        return self.space.id(self.layer, feature_id)

    def pre_activations(
        self, x: Float[Tensor, "*rows d_in"], ids: Ids | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return pre-activations, in float32 at least, differentiable in x.

        Args:
            x: raw activations of `reads`; [..., head, d_head] is flattened.
            ids: only these features, in this order; where the encoder is not in memory only their
                rows are read.

        Raises:
            DictionaryError: the width is another one.
        """
        x = self._widened(self._flat(x))
        if self.token_norm is not None:
            x = self.token_norm.apply(x)
        bias = self.bias.to(x.device)
        if self.center is not None:
            x = x - self.center.to(x.device, x.dtype)
        if ids is None:
            return _linear(x, self.encoder.tensor(), bias)
        index = indices(ids, self.n_features, "the dictionary")
        return _linear(x, self.encoder.rows(index), bias[index.to(bias.device)])

    def encode(
        self, x: Float[Tensor, "*rows d_in"], ids: Ids | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Return feature values, in float32 at least, differentiable in x.

        Args:
            x: raw activations of `reads`.
            ids: only these features, in this order. A gate that ranks features still computes all.

        Raises:
            DictionaryError: the width is another one.
        """
        if ids is None:
            return self.gate.activate(self.pre_activations(x))
        index = indices(ids, self.n_features, "the dictionary")
        if self.gate.local:
            return self.gate.activate(self.pre_activations(x, index), index)
        found = self.gate.activate(self.pre_activations(x))
        return found[..., index.to(found.device)]

    def decode(
        self,
        features: Float[Tensor, "*rows n"],
        *,
        x: Float[Tensor, "*rows d_in"] | None = None,
        to: int = 0,
    ) -> Float[Tensor, "*rows d_out"]:
        """Return what feature values write, in raw units.

        Args:
            features: values of all features.
            x: the raw activations they were encoded from; needed by skip transcoders and by
                normalisation per token.
            to: index into `writes`; biases and the skip belong to the first.

        Raises:
            DictionaryError: x is needed and missing, or the width is another one.
        """
        if features.shape[-1] != self.n_features:
            raise DictionaryError(
                f"decode got {features.shape[-1]} features; this dictionary has {self.n_features}"
            )
        features = self._widened(features)
        written = _linear(features, self.decoders[to].tensor().T, None)
        if to == 0:
            written = written + self.decoder_bias.to(written.device, written.dtype)
        if x is None and (self.token_norm is not None or self.skip is not None):
            why = "normalises every token by itself" if self.token_norm else "has a skip connection"
            raise DictionaryError(f"this dictionary {why}: decode needs x, what was encoded")
        if x is not None:
            x = self._widened(self._flat(x))
            if self.token_norm is not None:
                written = self.token_norm.undo(written, x)
            if self.skip is not None and to == 0:
                written = written + _linear(x, self.skip, None)
        return written

    def reconstruct(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Return what the dictionary makes of raw activations at its first site of `writes`.

        The result has the shape of x, heads included, where the widths agree.
        """
        written = self.decode(self.encode(x), x=x)
        return written.view_as(x) if written.numel() == x.numel() else written

    def error(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Return ``x - reconstruct(x)``: what an autoencoder does not explain.

        Raises:
            DictionaryError: it is a transcoder, whose error is that of another site.
        """
        if not self.is_autoencoder:
            raise DictionaryError(
                f"a transcoder's error is at {self.writes[0]}: subtract reconstruct(x) from the "
                "activations of that site"
            )
        return self._widened(x) - self.reconstruct(x)

    def read_rows(self, ids: Ids) -> Float[Tensor, "k d_in"]:
        """Return the raw-space direction that each feature reads: d pre / d x.

        Raises:
            DictionaryError: there is no such feature, or tokens are normalised one by one, so that
                no single direction exists (differentiate `pre_activations` instead).
        """
        self._one_direction("read")
        return self.encoder.rows(ids)

    def read_bias(self, ids: Ids) -> Float[Tensor, " k"]:
        """Return the constant of ``pre = read_row . x + read_bias``, the pre-bias folded in."""
        rows = self.read_rows(ids)
        bias = self.bias[indices(ids, self.n_features, "the dictionary").to(self.bias.device)]
        if self.center is None:
            return bias
        return (bias.double() - rows.double() @ self.center.double()).to(bias.dtype)

    def write_directions(self, ids: Ids, *, to: int = 0) -> Float[Tensor, "k d_out"]:
        """Return the raw-space direction that each feature writes: d y / d f.

        Raises:
            DictionaryError: there is no such feature, or tokens are normalised one by one (use
                `write`, which knows the token).
        """
        self._one_direction("write")
        return self.decoders[to].rows(ids)

    def write(
        self,
        x: Float[Tensor, "*rows d_in"],
        change: Float[Tensor, "*rows k"],
        ids: Ids,
        *,
        to: int = 0,
    ) -> Float[Tensor, "*rows d_out"]:
        """Return the change of raw activations that a change of some features makes at tokens x."""
        change = self._widened(change)
        moved = _linear(change, self.decoders[to].rows(ids).T, None)
        if self.token_norm is not None:
            moved = moved * self.token_norm.scale(self._widened(self._flat(x)))
        return moved

    def load(self) -> SparseDictionary:
        """Read all matrices into memory and return this dictionary."""
        for matrix in self._matrices:
            matrix.load()
        return self

    def release(self) -> None:
        """Forget the matrices, which are read again when asked for; vectors stay."""
        for matrix in self._matrices:
            matrix.release()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the matrices and vectors in memory now."""
        return self.vector_bytes + sum(m.nbytes for m in self._matrices if m.resident)

    @property
    def vector_bytes(self) -> int:
        """Bytes of what is always in memory: biases, thresholds, the skip matrix."""
        vectors = (self.bias, self.decoder_bias, self.center, self.skip)
        held = [*(v for v in vectors if v is not None), *self.gate.tensors().values()]
        return sum(vector.numel() * vector.element_size() for vector in held)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return sum(matrix.bytes_read for matrix in self._matrices)

    def fold(self, scale: float) -> SparseDictionary:
        """Refuse: everything was folded when the dictionary was loaded.

        Raises:
            DictionaryError: always; folding twice is the classic silent error.
        """
        raise DictionaryError(
            f"this dictionary is folded already ({self.details.norm}); a scale of {scale:g} on top "
            "would be wrong: give activation_scale to `load` instead, once"
        )

    def but(self, **parts: Any) -> SparseDictionary:
        """Return a dictionary with some parts replaced, named as in the constructor."""
        given: dict[str, Any] = {
            "reads": self.reads,
            "writes": self.writes,
            "encoder": self.encoder,
            "decoders": self.decoders,
            "gate": self.gate,
            "bias": self.bias,
            "decoder_bias": self.decoder_bias,
            "center": self.center,
            "skip": self.skip,
            "token_norm": self.token_norm,
            "convention": self.details,
            "facts": self.facts,
            "space": self.space.name,
        }
        return SparseDictionary(**{**given, **parts})

    def require_model(self, model: LanguageModel, *, other_model: bool = False) -> None:
        """Check that a model has the sites and width of this dictionary, and its name.

        Args:
            model: the model it is to be used with.
            other_model: accept a model of another name than the dictionary was made for.

        Raises:
            DictionaryError: it belongs to another model, layer or width; says which.
        """
        from layerscope.features.belonging import require_model

        require_model(self, model, other_model=other_model)

    @property
    def _matrices(self) -> tuple[Matrix, ...]:
        return (self.encoder, *self.decoders)

    def _one_direction(self, what: str) -> None:
        if self.token_norm is not None:
            raise DictionaryError(
                f"this dictionary normalises every token by itself ({self.token_norm.kind}), so "
                f"its features {what} another direction at every token; use "
                + ("gradients of pre_activations" if what == "read" else "write(x, change, ids)")
            )

    def _flat(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise DictionaryError(f"a dictionary encodes floats, not {x.dtype}")
        if x.shape[-1] == self.d_in:
            return x
        if x.ndim >= 2 and x.shape[-1] * x.shape[-2] == self.d_in:
            return x.flatten(-2)
        raise DictionaryError(
            f"this dictionary reads {self.reads} of width {self.d_in}, but got width "
            f"{x.shape[-1]}: it belongs to another model or site"
        )

    def _widened(self, x: Tensor) -> Tensor:
        """Float32 at least: sums are never taken in half precision."""
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _check(self) -> None:
        n, d_out = self.n_features, self.d_out
        expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "bias": (self.bias, (n,)),
            "decoder bias": (self.decoder_bias, (d_out,)),
        }
        if self.center is not None:
            expected["pre-bias"] = (self.center, (self.d_in,))
        if self.skip is not None:
            expected["skip matrix"] = (self.skip, (d_out, self.d_in))
        for name, vector in self.gate.tensors().items():
            expected[name] = (vector, (n,))
        for name, (vector, shape) in expected.items():
            if tuple(vector.shape) != shape:
                raise DictionaryError(
                    f"the {name} of {self.encoder.name} has shape {list(vector.shape)}; it needs "
                    f"{list(shape)}"
                )
            if not bool(vector.isfinite().all()):
                raise DictionaryError(f"the {name} of {self.encoder.name} holds NaN or infinity")
        if len(self.decoders) != len(self.writes) or not self.writes:
            raise DictionaryError("a dictionary needs one decoder for every site it writes")
        for decoder in self.decoders:
            if decoder.shape[0] != n:
                raise DictionaryError(
                    f"{decoder.name} has {decoder.shape[0]} rows, {self.encoder.name} {n}"
                )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x weight^T + bias`` in the dtype of x, converting the weight slice by slice."""
    if weight.device != x.device:
        weight = weight.to(x.device)
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if weight.dtype == x.dtype:
            return F.linear(x, weight, bias)
        if weight.shape[0] > weight.shape[1]:
            parts = [
                F.linear(x, weight[first : first + _SLICE].to(x.dtype))
                for first in range(0, weight.shape[0], _SLICE)
            ]
            found = torch.cat(parts, dim=-1)
            return found if bias is None else found + bias
        return F.linear(x, weight.to(x.dtype), bias)
