"""Writing a dictionary as SAELens reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features.architectures import Gate, Gated, JumpRelu, Relu, TopK
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.formats.saelens import CONFIG, WEIGHTS
from layerscope.files import atomic_path, write_json
from layerscope.models.sites import Site

SPARSITY = "sparsity.safetensors"
_TRANSFORMER_LENS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_in": "blocks.{}.ln2.hook_normalized",
    "attn_in": "blocks.{}.ln1.hook_normalized",
    "attn.z": "blocks.{}.attn.hook_z",
}


def write_dictionary(
    dictionary: SparseDictionary,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    figures: Mapping[str, Any] | None = None,
    log_sparsity: Tensor | None = None,
) -> Path:
    """Write a dictionary as a SAELens folder (version 6) and return the folder.

    All folding stays folded: the file says that no normalisation is needed, and that it was folded.

    Args:
        dictionary: in raw units, as every `SparseDictionary` is.
        folder: created; files that are there are replaced.
        dtype: of the two large matrices; None keeps that in memory. Vectors stay float32.
        figures: kept in the metadata (``l0``, ``fvu``, ...), where the checks look for them.
        log_sparsity: [n] log10 of how often each feature fires.

    Raises:
        DictionaryError: SAELens has no form for this gate or for several written sites.
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    if len(dictionary.writes) > 1:
        raise DictionaryError("SAELens has no form for a dictionary that writes several sites")
    folder = Path(folder)
    tensors: dict[str, Tensor] = {
        "W_enc": dictionary.encoder.tensor().T.to(dtype or dictionary.encoder.dtype),
        "W_dec": dictionary.decoders[0].tensor().to(dtype or dictionary.decoders[0].dtype),
        "b_dec": dictionary.decoder_bias,
    }
    architecture, extra = _gate(dictionary.gate)
    keeps_bias = dictionary.center is not None and torch.equal(
        dictionary.center, dictionary.decoder_bias
    )
    bias = dictionary.bias
    if dictionary.center is not None and not keeps_bias:
        shift = dictionary.encoder.tensor().double() @ dictionary.center.double()
        bias = (bias.double() - shift).to(bias.dtype)
    tensors |= _gate_tensors(dictionary.gate, bias)
    if not dictionary.is_autoencoder:
        architecture = _as_transcoder(architecture, dictionary)
    if dictionary.skip is not None:
        tensors["W_skip"] = dictionary.skip
    with atomic_path(folder / WEIGHTS[0]) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    if log_sparsity is not None:
        with atomic_path(folder / SPARSITY) as temporary:
            save_file({"sparsity": log_sparsity.float().cpu()}, temporary)
    written = [hook_name(site) for site in dictionary.writes]
    norm = dictionary.token_norm.kind if dictionary.token_norm else "none"
    config = {
        "architecture": architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        **({} if dictionary.is_autoencoder else {"d_out": dictionary.d_out}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": keeps_bias,
        "normalize_activations": norm,
        "reshape_activations": "hook_z" if dictionary.reads.kind == "attn.z" else "none",
        **extra,
        "metadata": {
            "model_name": dictionary.facts.get("model_name"),
            "hook_name": hook_name(dictionary.reads),
            **({} if dictionary.is_autoencoder else {"hook_name_out": written[0]}),
            "prepend_bos": dictionary.facts.get("prepend_bos", True),
            "context_size": dictionary.facts.get("context_size"),
            "sae_lens_version": "6.0.0",
            "layerscope": {"folded": True, **dict(figures or {})},
        },
    }
    write_json(folder / CONFIG, config)
    return folder


def hook_name(site: Site) -> str:
    """Return a site's name in TransformerLens, or our own where it has none."""
    template = _TRANSFORMER_LENS.get(site.kind)
    return str(site) if template is None else template.format(site.layer)


def _gate(gate: Gate) -> tuple[str, dict[str, Any]]:
    if isinstance(gate, JumpRelu) and not gate.inclusive:
        return "jumprelu", {}
    if isinstance(gate, Gated):
        return "gated", {}
    if isinstance(gate, TopK) and gate.weights is None:
        return "topk", {"k": gate.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(gate, Relu):
        return "standard", {}
    raise DictionaryError(
        f"SAELens has no form for the gate '{gate.describe()}'; a batch topk needs its threshold"
    )


def _gate_tensors(gate: Gate, bias: Tensor) -> dict[str, Tensor]:
    if isinstance(gate, Gated):
        # The magnitude is slope * pre + shift for the same pre, so b_mag = shift + slope * b_gate.
        slope = gate.slope.double()
        b_mag = gate.shift.double() + slope * bias.double()
        return {
            "b_gate": bias,
            "r_mag": slope.log().to(bias.dtype),
            "b_mag": b_mag.to(bias.dtype),
        }
    found = {"b_enc": bias}
    if isinstance(gate, JumpRelu):
        found["threshold"] = gate.thresholds
    return found


def _as_transcoder(architecture: str, dictionary: SparseDictionary) -> str:
    names = {
        ("standard", False): "transcoder",
        ("standard", True): "skip_transcoder",
        ("jumprelu", False): "jumprelu_transcoder",
        ("jumprelu", True): "jumprelu_skip_transcoder",
    }
    found = names.get((architecture, dictionary.skip is not None))
    if found is None:
        raise DictionaryError(f"SAELens has no transcoder with the gate of '{architecture}'")
    return found
