"""Take a TransformerLens object that is already built, or put a bridge around a folder's model."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerscope.errors import CapabilityError, ConfigError, IdentityError, ModelError
from layerscope.models import identities
from layerscope.models.backends.huggingface.fingerprints import (
    hash_tokenizer,
    hash_weights,
    versions,
)
from layerscope.models.backends.huggingface.loading import (
    LoadedModel,
    check_sizes,
    load_pretrained,
)
from layerscope.models.backends.transformer_lens.backend import TransformerLensBackend
from layerscope.models.backends.transformer_lens.structure import kind_of, structure_of
from layerscope.models.devices import DeviceLike, DtypeLike, dtype_name
from layerscope.models.identities import IdentityReport
from layerscope.models.sites import LAYER_KINDS, Site

_PROBE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class LoadedLens:
    """A TransformerLens object with its tokenizer, and where both came from.

    `origin` is the Hugging Face model that a bridge was built around here; None for an object that
    was given.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    origin: LoadedModel | None = None
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def weights_hash(self) -> str:
        """The sha256 of the files read here, or of the weights as a given object holds them now."""
        return hash_weights(self.model) if self.origin is None else self.origin.weights_hash

    @property
    def tokenizer_hash(self) -> str:
        """The sha256 of the tokenizer's serialisation."""
        return hash_tokenizer(self.tokenizer)

    def provenance(self) -> dict[str, Any]:
        """Return what tells this model from others, ready for JSON."""
        known = {"versions": versions()} if self.origin is None else self.origin.provenance()
        weight: torch.Tensor = self.model.W_E
        config = self.model.cfg
        architecture = getattr(config, "original_architecture", None)
        given: dict[str, Any] = {
            "id": self.source,
            "kind": "memory",
            "revision": None,
            "model_type": str(architecture or getattr(config, "architecture", None)),
            "weights_sha256": self.weights_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "device": str(weight.device),
            "dtype": dtype_name(weight.dtype),
            "dtype_reason": "as given",
            **known,
        }
        version = metadata.version("transformer-lens")
        return {
            **given,
            "model_class": kind_of(self.model),
            "versions": {**given["versions"], "transformer_lens": version},
            **self.notes,
        }


def load_lens(
    source: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedLens:
    """Take a `HookedTransformer` or `TransformerBridge`, or build a bridge for an id or a folder.

    An object is put in eval mode, and neither moved nor cast.

    Raises:
        ModelError: TransformerLens is not installed, or the source is none of these.
        CapabilityError: an object is asked to move or to change its dtype.
    """
    kind = kind_of(source)
    if kind is None:
        return _boot(source, tokenizer, device, dtype, revision, trust_remote_code)
    if device is not None or dtype is not None:
        raise CapabilityError(
            f"a {kind} is taken as it is: move or cast it yourself (model.to(...)), then load it"
        )
    if revision is not None:
        raise ModelError("revision is for hub ids, and this model is already built")
    tokenizer = source.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ModelError(f"this {kind} has no tokenizer: pass one (tokenizer=...)")
    source.eval()
    config = source.cfg
    name = str(getattr(config, "model_name", None) or kind)
    check_sizes(tokenizer, int(source.W_E.shape[0]), name, warn=True)
    notes = {
        "normalization_type": getattr(config, "normalization_type", None),
        "compatibility_mode": bool(getattr(source, "compatibility_mode", False)),
    }
    return LoadedLens(source, tokenizer, name.rstrip("/").rsplit("/", 1)[-1], name, notes=notes)


def open_model(
    source: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> tuple[TransformerLensBackend, LoadedLens, IdentityReport | None]:
    """Load as `load_lens` does, and prove the identities unless `verify` is off.

    Raises:
        IdentityError: the object is not what its sites would claim, or a bridge put around a
            folder's model gives other logits than the model.
        ModelError: it cannot be loaded, read or run.
    """
    loaded = load_lens(
        source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    backend = TransformerLensBackend(structure_of(loaded.model))
    _require_stream(backend, loaded.name)
    if not verify:
        return backend, loaded, None
    report = identities.check(backend)
    report.require(loaded.name)
    return backend, loaded, report


def _require_stream(backend: TransformerLensBackend, name: str) -> None:
    """Refuse an object that does not show the residual stream and what is added to it."""
    sites = [Site("final_norm")]
    for layer in range(backend.info.n_layers):
        sites += [Site(kind, layer) for kind in LAYER_KINDS if kind != "resid_mid"]
    for site in sites:
        reason = backend.why_not(site)
        if reason is not None:
            raise ModelError(
                f"{name} is refused: {reason}; use the Hugging Face backend for this model"
            )


def _boot(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    device: DeviceLike | None,
    dtype: DtypeLike | None,
    revision: str | None,
    trust_remote_code: bool,
) -> LoadedLens:
    """Load a Hugging Face model and put a bridge around it."""
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        raise ConfigError(
            f"the transformer_lens backend takes a HookedTransformer, a TransformerBridge, an id "
            f"or a folder, not a {type(source).__name__}"
        )
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ModelError(
            "the transformer_lens backend needs TransformerLens: "
            "pip install 'layerscope[transformer-lens]'"
        ) from error
    loaded = load_pretrained(
        source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    config = loaded.model.config
    if not config.architectures:
        config.architectures = [type(loaded.model).__name__]
    before = _probe_logits(loaded.model, loaded)
    try:
        bridge: Any = TransformerBridge.boot_transformers(
            loaded.source,
            hf_model=loaded.model,
            tokenizer=loaded.tokenizer,
            device=loaded.device,
            dtype=loaded.dtype,
            trust_remote_code=trust_remote_code,
        )
    # Adapters fail in many ways on models that they do not know: all mean the same here.
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(
            f"TransformerLens cannot wrap {loaded.source}: {type(error).__name__}: {line}"
        ) from error
    bridge.eval()
    _require_same(before, _probe_logits(bridge, loaded), loaded)
    return LoadedLens(bridge, loaded.tokenizer, loaded.name, loaded.source, loaded)


def _probe_logits(model: Any, loaded: LoadedModel) -> Float[Tensor, "pos vocab"]:
    """Return the logits of a few tokens."""
    known = int(cast(Tensor, loaded.model.get_input_embeddings().weight).shape[0])
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    length = min(_PROBE_TOKENS, longest or _PROBE_TOKENS)
    ids = torch.tensor([[(13 + 7919 * index) % known for index in range(length)]])
    with torch.no_grad():
        output = model(ids.to(loaded.device))
    return (output if isinstance(output, Tensor) else output.logits)[0].float()


def _require_same(expected: Tensor, found: Tensor, loaded: LoadedModel) -> None:
    """Refuse a bridge that does not compute what the model it was put around does."""
    error = identities.relative_error(found, expected)
    if not error <= identities.bound_of(loaded.dtype):
        raise IdentityError(
            f"the bridge that TransformerLens puts around {loaded.source} gives other logits than "
            f"the model itself (off by {error:.2g} of the largest); use the huggingface backend"
        )
