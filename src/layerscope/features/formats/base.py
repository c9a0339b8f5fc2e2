"""What every format owes, and the one place where conventions are folded."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import DictionaryError, SiteError
from layerscope.features.architectures import Gate, TopK
from layerscope.features.architectures.topk import BatchTopK, GroupMax
from layerscope.features.conventions import Convention
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.matrices import Matrix
from layerscope.features.tensors import TensorFile
from layerscope.features.token_norms import TokenNorm
from layerscope.models.sites import Site

Units = Literal["stored", "raw", "unit", "norm"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a file may not say.

    Attributes:
        hook: the site that is read, where files do not say or say it wrongly.
        hook_out: the site that is written, for transcoders.
        activation_scale: what activations are multiplied with to have the norm that the dictionary
            was trained on, for files that were stored before it was folded.
        normalize_decoder: rescale features to unit decoder norm where a format's own loader does.
        k: of a TopK dictionary whose file does not say.
        dtype: of the matrices in memory.
        device: where they are kept.
    """

    hook: str | None = None
    hook_out: str | None = None
    activation_scale: float | None = None
    normalize_decoder: bool = True
    k: int | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Found:
    """One dictionary that a format recognised.

    Attributes:
        format: code of the format, "F1" to "F13".
        path: its folder, or its file where a folder holds several.
        layer: block it reads; None where its header must be asked.
        label: what tells it from its neighbours.
    """

    format: str
    path: Path
    layer: int | None = None
    label: str = ""


class Format(ABC):
    """One way of storing dictionaries.

    Attributes:
        code: "F1" to "F13".
        name: short name.
        title: what it is, for the table of formats.
        patterns: files that a hub download of this format needs.
    """

    code: str
    name: str
    title: str
    patterns: Sequence[str] = ("*.json", "*.yaml", "*.safetensors")

    @abstractmethod
    def find(self, root: Path) -> list[Found]:
        """Return the dictionaries of this format in a folder (or the one in a file)."""

    @abstractmethod
    def read(self, found: Found, options: LoadOptions) -> Raw:
        """Read a dictionary's header and vectors; matrices stay in the file.

        Raises:
            DictionaryError: something is missing, damaged, or beyond layerscope.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Raw:
    """A dictionary as its file has it, and what must be done to use it on raw activations.

    Attributes:
        format: name of the format.
        reads, writes: sites.
        encoder: [n, d_in], decoders: [n, d_out], unscaled.
        b_enc: [n], b_dec: [d_out] as stored.
        gate: in the units of the file.
        pre_bias: whether b_dec is subtracted before encoding.
        input_scale: what raw activations are multiplied with before encoding.
        output_scale: what the decoded is divided by.
        units: of the features: as "stored", "raw" (divided by the input scale), "unit" (the decoder
            gets unit norm), "norm" (multiplied by the stored decoder norm).
        rank_by_norm: the gate judges values multiplied by the decoder norm.
        gate_is_final: the gate's threshold is meant in the final units.
        token_norm: normalisation per token.
        skip: [d_out, d_in].
        norm_words, notes: for the convention line.
        facts: JSON-able, kept with the dictionary.
        folded: folding was done by whoever stored it; nothing may be folded again.
        finish: makes the folded dictionary one of another class.
    """

    format: str
    reads: Site
    writes: tuple[Site, ...]
    encoder: Matrix
    decoders: tuple[Matrix, ...]
    b_enc: Float[Tensor, " n"]
    b_dec: Float[Tensor, " d_out"]
    gate: Gate
    pre_bias: bool = False
    input_scale: float = 1.0
    output_scale: float = 1.0
    units: Units = "stored"
    rank_by_norm: bool = False
    gate_is_final: bool = False
    token_norm: TokenNorm | None = None
    skip: Float[Tensor, "d_out d_in"] | None = None
    norm_words: str = ""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folded: bool = False
    finish: Callable[[SparseDictionary], SparseDictionary] | None = None

    def fold(self, *, space: str = "") -> SparseDictionary:
        """Return the dictionary in raw units; done once.

        With s_in and s_out the two scales, m the stored decoder norms and u the units (1, 1/s_in,
        m/s_out or m): ``R = u s_in W_enc``, ``b = u b_enc``, ``D = W_dec / (u s_out)``,
        ``c = b_dec / s_in``, thresholds times u.

        Raises:
            DictionaryError: it was folded already, or a scale is not positive and finite.
        """
        s_in, s_out = self.input_scale, self.output_scale
        if self.folded and (s_in, s_out) != (1.0, 1.0):
            raise DictionaryError(
                f"the {self.format} dictionary was stored with its normalisation folded: a scale "
                f"of {s_in:g} would be applied twice; leave activation_scale out"
            )
        for scale in (s_in, s_out):
            if not 0 < scale < float("inf"):
                raise DictionaryError(f"an activation scale of {scale:g} cannot be right")
        n = self.encoder.shape[0]
        device = self.b_enc.device
        ones = torch.ones(n, dtype=torch.float64, device=device)
        norms = ones
        if self.rank_by_norm or self.units in ("unit", "norm"):
            norms = self.decoders[0].norms().to(device)
            # A feature that writes nothing stays as it is.
            norms = torch.where(norms > 0, norms, ones)
        units = {
            "stored": ones,
            "raw": ones / s_in,
            "unit": norms / s_out,
            "norm": norms,
        }[self.units]
        gate = self._ranked(norms) if self.rank_by_norm else self.gate
        if not self.gate_is_final and bool((units != 1).any()):
            gate = gate.scaled(units)
        wide = torch.promote_types(self.b_enc.dtype, torch.float32)
        b_dec = self.b_dec.double()
        skip = self.skip
        if skip is not None:
            skip = (skip.double() * (s_in / s_out)).to(wide)
        made = SparseDictionary(
            reads=self.reads,
            writes=self.writes,
            encoder=self.encoder.scaled(units * s_in),
            decoders=[decoder.scaled(1 / (units * s_out)) for decoder in self.decoders],
            gate=gate,
            bias=(self.b_enc.double() * units).to(wide),
            decoder_bias=(b_dec / s_out).to(wide),
            center=(b_dec / s_in).to(wide) if self.pre_bias else None,
            skip=skip,
            token_norm=self.token_norm,
            convention=self._convention(gate),
            facts={"format": self.format, **self.facts},
            space=space,
        )
        return made if self.finish is None else self.finish(made)

    def _ranked(self, norms: Tensor) -> Gate:
        """Return the gate that judges values times decoder norm."""
        if isinstance(self.gate, TopK | BatchTopK | GroupMax):
            return type(self.gate)(self.gate.k, norms)
        return self.gate.scaled(1 / norms)

    def _convention(self, gate: Gate) -> Convention:
        norm = self.norm_words or (self.token_norm.kind + " per token" if self.token_norm else "")
        if not norm and (self.input_scale, self.output_scale) != (1.0, 1.0):
            norm = f"dataset s={self.input_scale:.4g} folded"
            if self.output_scale != self.input_scale:
                norm += f" (out {self.output_scale:.4g})"
        decoder = {
            "stored": "as stored",
            "raw": "raw units",
            "unit": "unit norm folded",
            "norm": "norm folded into features",
        }[self.units]
        judged = " on value * decoder norm" if self.rank_by_norm else ""
        return Convention(
            pre_bias="yes (b_dec)" if self.pre_bias else "no",
            norm=norm or "none",
            gate=gate.describe() + judged,
            decoder=decoder,
            notes=(*self.notes, self.format),
        )


def matrix(
    file: TensorFile,
    name: str,
    options: LoadOptions,
    *,
    features_first: bool,
    part: Callable[[Tensor], Tensor] | None = None,
    times: float = 1.0,
) -> Matrix:
    """Return a matrix of a file with one row per feature.

    Args:
        file: its file.
        name: of the tensor.
        options: dtype and device.
        features_first: whether the tensor is [n, width] as stored.
        part: what to take of a tensor of more axes, before it is turned.
        times: a number that all entries are multiplied with.
    """
    entry = file.entry(name)
    if not entry.dtype.is_floating_point:
        raise DictionaryError(
            f"{file.path}: '{name}' has the dtype {str(entry.dtype).removeprefix('torch.')}; "
            "weights must be floats"
        )

    def view() -> Tensor:
        values = file.view(name)
        values = values if part is None else part(values)
        return values if features_first else values.T

    shape = entry.shape
    if part is not None:
        shape = tuple(part(torch.empty(entry.shape, device="meta")).shape)
    if len(shape) != 2 or 0 in shape:
        raise DictionaryError(
            f"{file.path}: '{name}' has the shape {list(shape)}; it needs two axes"
        )
    rows, width = shape if features_first else (shape[1], shape[0])
    scale = None if times == 1 else torch.full((rows,), times)
    return Matrix(
        f"'{name}' of {file.path}",
        view,
        (rows, width),
        scale=scale,
        dtype=options.dtype,
        device=options.device,
    )


def vector(file: TensorFile, options: LoadOptions, *names: str) -> Tensor:
    """Return a vector of a file in float32 at least; the first of the names that is there."""
    name = file.entry(*names).name
    values = file.view(name)
    wide = torch.promote_types(values.dtype, torch.float32)
    found = values.to(options.device, wide, copy=True)
    if not bool(found.isfinite().all()):
        raise DictionaryError(f"'{name}' of {file.path} holds NaN or infinity; download it again")
    return found


def vector_or_zeros(file: TensorFile, options: LoadOptions, name: str, size: int) -> Tensor:
    """Return a vector, or zeros where a file has none."""
    if name in file:
        return vector(file, options, name)
    return torch.zeros(size, device=options.device)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a file.

    Raises:
        DictionaryError: it is missing, truncated, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"there is no {path}, which says how to read the weights") from None
    except (OSError, ValueError) as error:
        raise DictionaryError(f"{path} cannot be read: {error}; download it again") from None
    return _object(path, found)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping of a file; raises DictionaryError like `read_json`."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DictionaryError(f"there is no {path}, which says how to read the weights") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DictionaryError(f"{path} cannot be read: {reason}; download it again") from None
    return _object(path, found)


def _object(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise DictionaryError(f"{path} does not describe a dictionary")
    return cast("dict[str, Any]", found)


def site_of(name: str | None, path: Path, *, layer: int | None = None) -> Site:
    """Return the site that a hook's name means.

    Names of TransformerLens, of Hugging Face modules and of layerscope are understood.

    Raises:
        DictionaryError: the name is missing or unknown; says what to give instead.
    """
    if not name:
        raise DictionaryError(f"{path} does not say which site it reads; give hook='resid_post.L'")
    text = name.strip()
    for pattern, kind in _HOOKS:
        match = re.fullmatch(pattern, text)
        if match:
            number = match.groupdict().get("layer") or layer
            if number is None:
                raise DictionaryError(
                    f"{path}: the hook '{name}' does not say its layer; give hook"
                )
            text = kind.format(number)
            break
    try:
        return Site.parse(text)
    except SiteError as error:
        raise DictionaryError(f"{path}: unknown hook '{name}' ({error}); give hook") from None


# Names that `Site` does not know, or that mean something else than they seem to.
_HOOKS = (
    # What TransformerLens feeds its MLP before the norm is the stream.
    (r"blocks\.(?P<layer>\d+)\.hook_mlp_in", "resid_mid.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?mlp\.hook_in", "mlp_in.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?mlp\.hook_out", "mlp_out.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?ln2\.hook_normalized", "mlp_in.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?hook_resid_mid", "resid_mid.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?hook_resid_pre", "resid_pre.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?hook_resid_post", "resid_post.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?hook_mlp_out", "mlp_out.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?hook_attn_out", "attn_out.{}"),
    (r"(?:blocks\.(?P<layer>\d+)\.)?attn\.hook_z", "attn.{}.z"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)(?:\.output)?", "resid_post.{}"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.mlp(?:\.output)?", "mlp_out.{}"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.self_attn\.o_proj\.input", "attn.{}.z"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.pre_feedforward_layernorm\.output", "mlp_in.{}"),
    (r"(?:model\.)?layers\.(?P<layer>\d+)\.post_feedforward_layernorm\.output", "mlp_out.{}"),
    (r"(?:transformer\.h|gpt_neox\.layers)\.(?P<layer>\d+)", "resid_post.{}"),
    (r"(?:transformer\.h|gpt_neox\.layers)\.(?P<layer>\d+)\.mlp", "mlp_out.{}"),
    (r"h\.(?P<layer>\d+)", "resid_post.{}"),
    (r"embed_tokens|(?:model\.)?embed_tokens", "embed"),
)


def with_hooks(raw: Raw, options: LoadOptions, path: Path) -> Raw:
    """Return a raw dictionary with the sites that the caller named, if any."""
    layer = raw.reads.layer
    if options.hook is not None:
        reads = site_of(options.hook, path, layer=layer)
        writes = (reads,) if raw.writes == (raw.reads,) else raw.writes
        raw = replace(raw, reads=reads, writes=writes)
    if options.hook_out is not None:
        raw = replace(raw, writes=(site_of(options.hook_out, path, layer=layer), *raw.writes[1:]))
    return raw


def layer_in(text: str) -> int | None:
    """Return the layer that a name speaks of (``layer_12``, ``L12R``, ``layers.12``), or None."""
    match = re.search(r"(?:layers?[._]?|blocks\.|resid_post_layer_|\bL)(\d+)", text)
    return int(match[1]) if match else None


def folders_with(root: Path, *names: str, depth: int = 4) -> list[Path]:
    """Return the folders at or below `root` that hold all of these files, sorted."""
    if not root.is_dir():
        return []
    found: list[Path] = []
    for path in sorted(root.rglob(names[0])):
        folder = path.parent
        close = len(folder.relative_to(root).parts) <= depth
        if close and all((folder / name).is_file() for name in names[1:]):
            found.append(folder)
    return found


def first_file(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first of these files that exists in a folder."""
    for name in names:
        path = folder / name
        if path.is_file():
            return path
    return None
