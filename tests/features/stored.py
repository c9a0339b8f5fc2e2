"""One planted dictionary as every format stores it: each undoes its own convention."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from planted import Planted
from safetensors.torch import save_file
from torch import Tensor

LAYER = 1


@dataclass
class Case:
    """A stored dictionary: where it lies, and what `load` must be told beside."""

    path: Path
    options: dict[str, Any] = field(default_factory=dict)


def _save(path: Path, **tensors: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, path)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _norms(n: int) -> Tensor:
    return torch.linspace(0.5, 2.0, n, dtype=torch.float64)


def _saelens(folder: Path, config: dict[str, Any], **tensors: Tensor) -> Case:
    metadata = {"hook_name": f"blocks.{LAYER}.hook_resid_post", "model_name": "planted"}
    n, d = tensors["W_dec"].shape
    full = {"d_in": d, "d_sae": n, "dtype": "float32", "metadata": metadata, **config}
    _json(folder / "cfg.json", full)
    _save(folder / "sae_weights.safetensors", **tensors)
    return Case(folder)


def saelens_standard(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    return _saelens(
        folder,
        {"architecture": "standard", "apply_b_dec_to_input": True},
        W_enc=p.directions.T, W_dec=p.directions, b_enc=torch.zeros(n), b_dec=p.offset,
    )  # fmt: skip


def saelens_old(p: Planted, folder: Path) -> Case:
    """A flat configuration of before version 6, trained on scaled activations."""
    n, s = len(p.directions), 0.37
    _json(
        folder / "cfg.json",
        {
            "hook_point": f"blocks.{LAYER}.hook_resid_post",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 3},
            "normalize_activations": True,
        },
    )
    _save(
        folder / "sae_weights.safetensors",
        W_enc=p.directions.T / s, W_dec=p.directions * s, b_enc=torch.zeros(n), b_dec=p.offset * s,
    )  # fmt: skip
    return Case(folder, {"activation_scale": s})


def saelens_topk_rescaled(p: Planted, folder: Path) -> Case:
    m = _norms(len(p.directions))[:, None]
    return _saelens(
        folder,
        {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True},
        W_enc=(p.directions / m).T, W_dec=p.directions * m,
        b_enc=torch.zeros(len(m)), b_dec=p.offset,
    )  # fmt: skip


def saelens_gated(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    r = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    return _saelens(
        folder,
        {"architecture": "gated", "apply_b_dec_to_input": True},
        W_enc=(p.directions / r.exp()[:, None]).T, W_dec=p.directions, b_dec=p.offset,
        b_gate=torch.full((n,), -0.3), b_mag=torch.zeros(n), r_mag=r,
    )  # fmt: skip


def saelens_jumprelu(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    return _saelens(
        folder,
        {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        W_enc=p.directions.T, W_dec=p.directions, b_dec=p.offset,
        b_enc=-(p.directions @ p.offset), threshold=torch.full((n,), 0.5),
    )  # fmt: skip


def gemma_scope(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    place = folder / "gemma-scope-planted-res" / f"layer_{LAYER}" / "width_16k" / "average_l0_3"
    place.mkdir(parents=True)
    arrays = {
        "W_enc": p.directions.T, "W_dec": p.directions, "b_enc": -(p.directions @ p.offset),
        "b_dec": p.offset, "threshold": torch.full((n,), 0.5),
    }  # fmt: skip
    np.savez(place / "params.npz", **{k: v.float().numpy() for k, v in arrays.items()})
    return Case(folder)


def gemma_scope_2(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    place = folder / "resid_post_all" / f"layer_{LAYER}_width_16k_l0_small"
    _save(
        place / "params.safetensors",
        w_enc=p.directions.T, w_dec=p.directions, b_enc=-(p.directions @ p.offset),
        b_dec=p.offset, threshold=torch.full((n,), 0.5),
    )  # fmt: skip
    return Case(folder)


def llama_scope(p: Planted, folder: Path) -> Case:
    n, d = p.directions.shape
    norm_in, norm_out = 10.0, 6.0
    s_in, s_out = sqrt(d) / norm_in, sqrt(d) / norm_out
    m = _norms(n)[:, None]
    place = folder / f"Planted-L{LAYER}R-8x"
    hook = f"blocks.{LAYER}.hook_resid_post"
    _json(
        place / "hyperparams.json",
        {
            "hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu",
            "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise", "top_k": 3,
            "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
            "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False, "d_model": d, "d_sae": n,
        },
    )  # fmt: skip
    _save(
        place / "checkpoints" / "final.safetensors",
        **{
            "encoder.weight": p.directions * s_out / (s_in * m),
            "encoder.bias": -(p.directions @ p.offset) * s_out / m[:, 0],
            "decoder.weight": (p.directions * m).T,
            "decoder.bias": p.offset * s_out,
        },
    )
    return Case(folder)


def llama_scope_r1(p: Planted, folder: Path) -> Case:
    n, d = p.directions.shape
    _json(
        folder / "config.json",
        {"hook_point_in": f"blocks.{LAYER}.hook_resid_post", "d_model": d, "expansion_factor": 1},
    )
    _save(
        folder / "sae_weights.safetensors",
        **{
            "encoder.weight": p.directions, "encoder.bias": -(p.directions @ p.offset),
            "decoder.weight": p.directions.T, "decoder.bias": p.offset,
            "log_jumprelu_threshold": torch.full((n,), log(0.5)),
        },
    )  # fmt: skip
    return Case(folder)


def llamascopium(p: Planted, folder: Path) -> Case:
    n, d = p.directions.shape
    norm = 7.0
    s = sqrt(d) / norm
    hook = f"blocks.{LAYER}.hook_resid_post"
    m = _norms(n)
    _json(
        folder / "config.json",
        {
            "sae_type": "sae", "act_fn": "jumprelu", "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": True, "hook_point_in": hook, "hook_point_out": hook,
        },
    )  # fmt: skip
    # Features are in raw units, f = f_stored / s, so W_D has the decoder's own norm.
    place = folder / "sae_weights.safetensors"
    _save(
        place,
        **{
            "W_E": p.directions.T, "b_E": -(p.directions @ p.offset) * s,
            "W_D": p.directions, "b_D": p.offset * s,
            "activation_function.log_jumprelu_threshold": torch.full((n,), log(0.5 * s)),
            f"dataset_average_activation_norm.{hook}": torch.tensor(norm),
        },
    )  # fmt: skip
    del m
    return Case(folder)


def sparsify(p: Planted, folder: Path) -> Case:
    place = folder / f"layers.{LAYER}"
    _json(place / "cfg.json", {"activation": "topk", "k": 3, "num_latents": 0, "transcode": False})
    _save(
        place / "sae.safetensors",
        **{
            "encoder.weight": p.directions, "encoder.bias": torch.zeros(len(p.directions)),
            "W_dec": p.directions, "b_dec": p.offset,
        },
    )  # fmt: skip
    return Case(folder)


def dictionary_learning(p: Planted, folder: Path) -> Case:
    m = _norms(len(p.directions))[:, None]
    place = folder / "trainer_0"
    _json(
        place / "config.json",
        {
            "trainer": {
                "dict_class": "AutoEncoder", "layer": LAYER, "lm_name": "planted",
                "submodule_name": f"resid_post_layer_{LAYER}",
            }
        },
    )  # fmt: skip
    state = {
        "bias": p.offset.float(), "encoder.weight": (p.directions / m).float(),
        "encoder.bias": torch.zeros(len(m)), "decoder.weight": (p.directions * m).T.float(),
    }  # fmt: skip
    torch.save(state, place / "ae.pt")
    return Case(folder)


def dictionary_learning_batch(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    place = folder / "trainer_0"
    _json(
        place / "config.json",
        {"trainer": {"dict_class": "BatchTopKSAE", "layer": LAYER, "k": 3}},
    )
    state = {
        "b_dec": p.offset.float(), "encoder.weight": p.directions.float(),
        "encoder.bias": torch.zeros(n), "decoder.weight": p.directions.T.float(),
        "k": torch.tensor(3), "threshold": torch.tensor(0.5),
    }  # fmt: skip
    torch.save(state, place / "ae.pt")
    return Case(folder)


def circuit_tracer(p: Planted, folder: Path) -> Case:
    n = len(p.directions)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "model_kind": "transcoder_set",
                "feature_input_hook": "hook_resid_post",
                "feature_output_hook": "hook_resid_post",
            }
        )
    )
    _save(
        folder / f"layer_{LAYER}.safetensors",
        **{
            "W_enc": p.directions, "W_dec": p.directions, "b_dec": p.offset,
            "b_enc": -(p.directions @ p.offset),
            "activation_function.threshold": torch.full((n,), 0.5),
        },
    )  # fmt: skip
    return Case(folder)


def qwen_scope(p: Planted, folder: Path) -> Case:
    place = folder / "SAE-Res-Planted-W32K-L0_3"
    place.mkdir(parents=True)
    state = {
        "W_enc": p.directions.float(), "W_dec": p.directions.T.float().contiguous(),
        "b_enc": -(p.directions @ p.offset).float(), "b_dec": p.offset.float(),
    }  # fmt: skip
    torch.save(state, place / f"layer{LAYER}.sae.pt")
    return Case(folder)


def goodfire(p: Planted, folder: Path) -> Case:
    return _modules(p, folder / f"Planted-SAE-l{LAYER}.pth", "encoder_linear", "decoder_linear")


def deepseek_r1(p: Planted, folder: Path) -> Case:
    return _modules(p, folder / f"Planted-SAE-l{LAYER}.pt", "encoder", "decoder")


def _modules(p: Planted, path: Path, encoder: str, decoder: str) -> Case:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        f"{encoder}.weight": p.directions.float(),
        f"{encoder}.bias": -(p.directions @ p.offset).float(),
        f"{decoder}.weight": p.directions.T.float(),
        f"{decoder}.bias": p.offset.float(),
    }
    torch.save(state, path)
    return Case(path.parent)


def temporal(p: Planted, folder: Path) -> Case:
    """Attention that predicts nothing, so that every code is novel."""
    n, d = p.directions.shape
    place = folder / f"layer_{LAYER}" / "temporal"
    place.mkdir(parents=True)
    s = 1.7
    (place / "conf.yaml").write_text(
        yaml.safe_dump(
            {
                "llm": {"dimin": d},
                "sae": {
                    "n_heads": 2, "n_attn_layers": 1, "bottleneck_factor": 2, "kval_topk": 3,
                    "tied_weights": False, "scaling_factor": s, "exp_factor": n / d,
                },
            }
        )
    )  # fmt: skip
    tensors = {
        "D": p.directions * s, "E": p.directions * 4 * d / s, "b": p.offset * s,
    }  # fmt: skip
    for name, out in (("q_target", n // 2), ("k_ctx", n // 2), ("v_ctx", n), ("c_proj", n)):
        tensors[f"attn_layers.0.{name}.weight"] = torch.zeros(out, n)
        tensors[f"attn_layers.0.{name}.bias"] = torch.zeros(out)
    _save(place / "latest_ckpt.safetensors", **tensors)
    return Case(folder)


WRITERS: dict[str, Callable[[Planted, Path], Case]] = {
    "F1 standard": saelens_standard,
    "F1 before version 6": saelens_old,
    "F1 topk rescaled": saelens_topk_rescaled,
    "F1 gated": saelens_gated,
    "F1 jumprelu": saelens_jumprelu,
    "F2": gemma_scope,
    "F3": gemma_scope_2,
    "F4": llama_scope,
    "F5": llama_scope_r1,
    "F6": llamascopium,
    "F7": sparsify,
    "F8 relu": dictionary_learning,
    "F8 batch topk": dictionary_learning_batch,
    "F9": circuit_tracer,
    "F10": qwen_scope,
    "F11": goodfire,
    "F12": deepseek_r1,
    "F13": temporal,
}
