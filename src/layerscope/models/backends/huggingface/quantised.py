"""Quantised models: how their weights are packed, what they need installed, what they cannot do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from layerscope.errors import ModelError
from layerscope.models.backends.base import Capability

# What may be asked of a model that packed weights can stand in the way of.
ASKED = {
    "gradients": "`run(gradients=True)`, attribution, training through the blocks",
    "head_out": "what one attention head adds, from the rows of the output projection",
    "memory_hash": "hash the weights of a model that was built in memory",
    "cast": "another dtype after loading",
    "move": "another device after loading",
    "split": "split over several devices by `device_map`",
    "lens_fitting": "fit a lens: reads residuals, trains through norm and unembedding only",
    "files_hash": "hash the weights by their files",
}

_GRADIENTS = "gradients would pass through packed weights, which no identity here has checked"
_HEAD_OUT = "the output projection is packed, so it has no rows to multiply one head with"
_HASH = "its bytes in memory depend on the kernel that packed them; load it by folder or hub id"
_CAST = "packed weights cannot be cast; pass the dtype when it is loaded"
_PACKED = {"gradients": _GRADIENTS, "head_out": _HEAD_OUT, "cast": _CAST}
_FIXED = "its kernels were chosen for the device it was loaded on; load it there again"


@dataclass(frozen=True)
class Scheme:
    """One way of quantising weights.

    Attributes:
        name: as provenance says it.
        bits: of a packed weight; None when the configuration does not say.
        packages: what transformers needs to load it: module, and what pip calls it.
        unpacked_on_cpu: without an accelerator transformers turns the weights back into the dtype
            asked for, and nothing is packed any more.
        kernels: modules without which it is unpacked on CUDA devices too.
        lost: what cannot be asked of such a model, and why.
    """

    name: str
    bits: int | None
    packages: tuple[tuple[str, str], ...]
    lost: Mapping[str, str]
    unpacked_on_cpu: bool = False
    kernels: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return scheme and bits, ready for JSON."""
        return {"scheme": self.name, "bits": self.bits}


_ACCELERATE = ("accelerate", "accelerate")
_BNB = (_ACCELERATE, ("bitsandbytes", "bitsandbytes"))
_GPTQ = (_ACCELERATE, ("optimum", "optimum"), ("gptqmodel", "gptqmodel"))
_AWQ = (_ACCELERATE, ("gptqmodel", "gptqmodel"))

SCHEMES: dict[str, Scheme] = {
    "bitsandbytes-8bit": Scheme("bitsandbytes-8bit", 8, _BNB, {**_PACKED, "move": _FIXED}),
    "bitsandbytes-4bit": Scheme("bitsandbytes-4bit", 4, _BNB, {**_PACKED}),
    "gptq": Scheme("gptq", None, _GPTQ, {**_PACKED, "memory_hash": _HASH, "move": _FIXED}),
    "awq": Scheme("awq", None, _AWQ, {**_PACKED, "memory_hash": _HASH, "move": _FIXED}),
    "mxfp4": Scheme(
        "mxfp4",
        4,
        (_ACCELERATE,),
        {
            # Only the experts are packed: a head's rows are there.
            "gradients": _GRADIENTS,
            "memory_hash": _HASH,
            "cast": _CAST,
            "move": _FIXED,
        },
        unpacked_on_cpu=True,
        kernels=("triton", "kernels"),
    ),
    "fp8": Scheme("fp8", 8, (_ACCELERATE,), {**_PACKED, "move": _FIXED}, unpacked_on_cpu=True),
}


def scheme_of(config: Any) -> Scheme | None:
    """Return how the weights of a configuration (or its dict) are quantised, if they are.

    A method that is not in the table is taken to lose whatever any of them loses.
    """
    found = _quantisation(config)
    if found is None:
        return None
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method") or ""))
    if method in ("", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        four = bool(found.get("load_in_4bit") or found.get("_load_in_4bit")) or "4" in method
        eight = bool(found.get("load_in_8bit") or found.get("_load_in_8bit")) or "8" in method
        if four or eight:
            return SCHEMES["bitsandbytes-4bit" if four else "bitsandbytes-8bit"]
    bits = found.get("bits", found.get("w_bit"))
    known = SCHEMES.get(method)
    if known is None:
        everything: dict[str, str] = {}
        for scheme in SCHEMES.values():
            everything |= scheme.lost
        known = Scheme(method or "unknown", None, (), everything)
    return replace(known, bits=bits) if isinstance(bits, int) else known


def scheme_of_model(model: PreTrainedModel) -> Scheme | None:
    """Return how a loaded model's weights are packed in memory; None when they are not.

    A model that was quantised in its files and unpacked on loading is an ordinary one.
    """
    if getattr(model, "hf_quantizer", None) is None and not getattr(model, "is_quantized", False):
        return None
    return scheme_of(model.config)


def disallows(scheme: Scheme | None, what: str) -> str | None:
    """Return why a quantised model cannot do `what` (a key of `ASKED`), or None when it can."""
    if what not in ASKED:
        raise KeyError(what)
    if scheme is None or what not in scheme.lost:
        return None
    return f"the model is quantised ({scheme.name}): {scheme.lost[what]}"


def capabilities_lost(model: PreTrainedModel) -> dict[Capability, str]:
    """Return the capabilities of the backend that a model's packed weights take away, and why."""
    scheme = scheme_of_model(model)
    reason = disallows(scheme, "gradients")
    return {} if reason is None else {Capability.GRADIENTS: reason}


def require_packages(scheme: Scheme, source: str) -> None:
    """Check that what loads a scheme is installed.

    Raises:
        ModelError: a package is missing; names the pip line.
    """
    absent = missing(name for name, _ in scheme.packages)
    if absent:
        wanted = " ".join(pip for name, pip in scheme.packages if name in absent)
        raise ModelError(
            f"{source} is quantised ({scheme.name}) and needs {', '.join(absent)}: "
            f"pip install {wanted}"
        )


def missing(modules: Iterable[str]) -> list[str]:
    """Return the modules that are not installed, without importing any."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def require_plain_ends(model: PreTrainedModel, source: str) -> None:
    """Check that embedding and unembedding are real matrices here, which every lens needs.

    Raises:
        ModelError: one of them is packed.
    """
    ends = {"embedding": model.get_input_embeddings(), "unembedding": model.get_output_embeddings()}
    for name, module in ends.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise ModelError(
                f"the {name} of {source} is packed; quantise it again without it "
                "(modules_to_not_convert), since every lens reads it"
            )
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.ndim != 2:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"the {name} of {source} is packed as {kind}; quantise it again without it "
                "(modules_to_not_convert), since every lens reads it"
            )


def _quantisation(config: Any) -> dict[str, Any] | None:
    if isinstance(config, Mapping):
        found: Any = cast(Mapping[str, Any], config).get("quantization_config")
    else:
        found = getattr(config, "quantization_config", None)
        if found is None and hasattr(config, "get_text_config"):
            found = getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    if isinstance(found, Mapping):
        return dict(cast(Mapping[str, Any], found))
    return dict(found.to_dict())
