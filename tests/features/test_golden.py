"""Random dictionaries against each format's own formulas, written out anew in float64."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from layerscope.errors import DictionaryError
from layerscope.features import load, open_set
from layerscope.features.dictionary import SparseDictionary
from layerscope.models import Site

N, D, ROWS, K = 30, 12, 50, 4
LAYERS = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()


def store(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    single = {k: v.float().contiguous() for k, v in tensors.items()}
    if path.suffix == ".pt":
        torch.save(single, path)
    else:
        save_file(single, path)
    text = yaml.safe_dump(config) if name.endswith(".yaml") else json.dumps(config)
    (path.parent / name).write_text(text)
    return path.parent


def compare(dictionary: SparseDictionary, x: Tensor, f: Tensor, y: Tensor) -> None:
    found = dictionary.encode(x.float()).double()
    assert torch.equal(found > 0, f > 0)
    torch.testing.assert_close(found, f, rtol=1e-5, atol=1e-5)
    made = dictionary.reconstruct(x.float()).double()
    torch.testing.assert_close(made, y, rtol=1e-5, atol=1e-5)


def topk(pre: Tensor, k: int = K) -> Tensor:
    value, at = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, at, value)


def saelens(tmp_path: Path, architecture: str, tensors: dict[str, Tensor], **more: Any) -> Path:
    metadata = {
        "hook_name": "blocks.1.hook_resid_post",
        "hook_name_out": "blocks.1.hook_mlp_out",
    }
    config = {"architecture": architecture, "metadata": metadata, **more}
    return store(tmp_path / "sae_weights.safetensors", tensors, config, "cfg.json")


X = 3 * draw(ROWS, D, seed=9)
BASE = {
    "W_enc": draw(D, N) / 3,
    "W_dec": draw(N, D) / 3,
    "b_enc": draw(N, seed=1) / 5,
    "b_dec": draw(D, seed=2) / 2,
}
THRESHOLD = draw(N, seed=3).abs() / 2


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_f1_jumprelu_with_every_norm(norm: str, tmp_path: Path) -> None:
    folder = saelens(
        tmp_path, "jumprelu", {**BASE, "threshold": THRESHOLD}, normalize_activations=norm
    )
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True)
    size = X.norm(dim=-1, keepdim=True) / sqrt(D)
    x = {"none": X, "layer_norm": (X - mean) / (std + 1e-5), "constant_norm_rescale": X / size}
    pre = (x[norm] - BASE["b_dec"]) @ BASE["W_enc"] + BASE["b_enc"]
    f = pre.relu() * (pre > THRESHOLD)
    y = f @ BASE["W_dec"] + BASE["b_dec"]
    y = {"none": y, "layer_norm": y * std + mean, "constant_norm_rescale": y * size}[norm]
    dictionary = load(folder)
    compare(dictionary, X, f, y)
    if norm != "none":
        with pytest.raises(DictionaryError, match="normalises every token"):
            dictionary.read_rows([0])
        with pytest.raises(DictionaryError, match="decode needs x"):
            dictionary.decode(f)


def test_f1_gated(tmp_path: Path) -> None:
    b_gate, b_mag, r = (draw(N, seed=seed) / 3 for seed in (4, 5, 6))
    tensors = {"W_enc": BASE["W_enc"], "W_dec": BASE["W_dec"], "b_dec": BASE["b_dec"]}
    folder = saelens(tmp_path, "gated", {**tensors, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r})
    x = X - BASE["b_dec"]
    on = x @ BASE["W_enc"] + b_gate > 0
    f = on * (x @ (BASE["W_enc"] * r.exp()) + b_mag).relu()
    compare(load(folder), X, f, f @ BASE["W_dec"] + BASE["b_dec"])


def test_f1_topk_ranked_by_decoder_norm(tmp_path: Path) -> None:
    folder = saelens(tmp_path, "topk", BASE, k=K, rescale_acts_by_decoder_norm=True)
    norms = BASE["W_dec"].norm(dim=1)
    pre = (X - BASE["b_dec"]) @ BASE["W_enc"] + BASE["b_enc"]
    f = topk(pre * norms).relu()
    compare(load(folder), X, f, (f / norms) @ BASE["W_dec"] + BASE["b_dec"])


def test_f1_skip_transcoder(tmp_path: Path) -> None:
    skip = draw(D, D, seed=7) / 4
    folder = saelens(
        tmp_path, "jumprelu_skip_transcoder", {**BASE, "threshold": THRESHOLD, "W_skip": skip}
    )
    pre = X @ BASE["W_enc"] + BASE["b_enc"]
    f = pre.relu() * (pre > THRESHOLD)
    dictionary = load(folder)
    assert dictionary.writes == (Site("mlp_out", 1),) and not dictionary.is_autoencoder
    compare(dictionary, X, f, f @ BASE["W_dec"] + BASE["b_dec"] + X @ skip.T)
    with pytest.raises(DictionaryError, match="error is at mlp_out"):
        dictionary.error(X)


def test_f3_affine_transcoder(tmp_path: Path) -> None:
    affine = draw(D, D, seed=8) / 4
    tensors = {name.lower(): value for name, value in BASE.items()}
    place = tmp_path / "transcoder_all" / "layer_1_width_16k_l0_big_affine" / "params.safetensors"
    store(
        place, {**tensors, "threshold": THRESHOLD, "affine_skip_connection": affine}, {}, "x.json"
    )
    pre = X @ BASE["W_enc"] + BASE["b_enc"]
    f = pre.relu() * (pre > THRESHOLD)
    dictionary = load(tmp_path)
    assert (dictionary.reads, dictionary.writes[0]) == (Site("mlp_in", 1), Site("mlp_out", 1))
    compare(dictionary, X, f, f @ BASE["W_dec"] + BASE["b_dec"] + X @ affine)


@pytest.mark.parametrize("by_norm", [True, False])
def test_f4_in_the_order_of_its_own_code(by_norm: bool, tmp_path: Path) -> None:
    norm_in, norm_out, threshold = 5.0, 2.0, 0.4
    hook = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    config = {
        "hook_point_in": hook[0],
        "hook_point_out": hook[1],
        "act_fn": "topk",
        "top_k": 5,
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
        "sparsity_include_decoder_norm": by_norm,
    }
    tensors = {
        "encoder.weight": BASE["W_enc"].T,
        "encoder.bias": BASE["b_enc"],
        "decoder.weight": BASE["W_dec"].T,
        "decoder.bias": BASE["b_dec"],
    }
    store(tmp_path / "checkpoints" / "final.safetensors", tensors, {}, "x.json")
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    s_in, s_out = sqrt(D) / norm_in, sqrt(D) / norm_out
    b_enc, b_dec = BASE["b_enc"] / s_in, BASE["b_dec"] / s_out
    w_dec, w_enc = BASE["W_dec"] * s_in / s_out, BASE["W_enc"]
    if by_norm:
        m = w_dec.norm(dim=1)
        w_dec, w_enc, b_enc = w_dec / m[:, None], w_enc * m, b_enc * m
    pre = X @ w_enc + b_enc
    f = pre * (pre > threshold)
    dictionary = load(tmp_path)
    assert (dictionary.reads, dictionary.writes[0]) == (Site("mlp_in", 1), Site("mlp_out", 1))
    compare(dictionary, X, f, f @ w_dec + b_dec)


def test_f4_ranked_by_value_times_decoder_norm_without_a_threshold(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_post"
    config = {"hook_point_in": hook, "act_fn": "topk", "top_k": K,
              "sparsity_include_decoder_norm": True}  # fmt: skip
    tensors = {
        "sae.encoder.weight": BASE["W_enc"].T,
        "sae.encoder.bias": BASE["b_enc"],
        "sae.decoder.weight": BASE["W_dec"].T,
        "sae.decoder.bias": BASE["b_dec"],
    }
    store(tmp_path / "sae_weights.pt", tensors, config, "hyperparams.json")
    norms = BASE["W_dec"].norm(dim=1)
    f = topk((X @ BASE["W_enc"] + BASE["b_enc"]) * norms).relu()
    compare(load(tmp_path), X, f, (f / norms) @ BASE["W_dec"] + BASE["b_dec"])


def test_f6_gate_counts_the_decoder_norm(tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_post"
    config = {"sae_type": "sae", "act_fn": "jumprelu", "norm_activation": "dataset-wise",
              "sparsity_include_decoder_norm": True, "hook_point_in": hook}  # fmt: skip
    tensors = {
        "W_E": BASE["W_enc"], "b_E": BASE["b_enc"], "W_D": BASE["W_dec"], "b_D": BASE["b_dec"],
        "activation_function.log_jumprelu_threshold": THRESHOLD.log(),
        f"dataset_average_activation_norm.{hook}": torch.tensor(5.0),
    }  # fmt: skip
    folder = store(tmp_path / "sae_weights.safetensors", tensors, config, "config.json")
    s = sqrt(D) / 5
    pre = (X * s) @ BASE["W_enc"] + BASE["b_enc"]
    f = pre * (pre * BASE["W_dec"].norm(dim=1) > THRESHOLD)
    y = (f @ BASE["W_dec"] + BASE["b_dec"]) / s
    compare(load(folder), X, f / s, y)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_f7_with_pre_bias_and_skip(activation: str, tmp_path: Path) -> None:
    skip = draw(D, D, seed=7) / 4
    k = 5
    config = {"activation": activation, "k": k, "num_latents": N, "transcode": False}
    tensors = {
        "encoder.weight": BASE["W_enc"].T, "encoder.bias": BASE["b_enc"],
        "W_dec": BASE["W_dec"], "b_dec": BASE["b_dec"], "W_skip": skip,
    }  # fmt: skip
    folder = store(tmp_path / "layers.1" / "sae.safetensors", tensors, config, "cfg.json")
    pre = ((X - BASE["b_dec"]) @ BASE["W_enc"] + BASE["b_enc"]).relu()
    if activation == "topk":
        f = topk(pre, k)
    else:
        groups = pre.view(ROWS, k, N // k)
        f = topk(groups, 1).view(ROWS, N)
    compare(load(folder), X, f, f @ BASE["W_dec"] + BASE["b_dec"] + X @ skip.T)


def test_f8_keeps_or_rescales_the_decoder(tmp_path: Path) -> None:
    config = {"trainer": {"dict_class": "AutoEncoder", "layer": 1}}
    tensors = {
        "encoder.weight": BASE["W_enc"].T, "encoder.bias": BASE["b_enc"],
        "decoder.weight": BASE["W_dec"].T, "bias": BASE["b_dec"],
    }  # fmt: skip
    folder = store(tmp_path / "ae.pt", tensors, config, "config.json")
    f = ((X - BASE["b_dec"]) @ BASE["W_enc"] + BASE["b_enc"]).relu()
    y = f @ BASE["W_dec"] + BASE["b_dec"]
    compare(load(folder, normalize_decoder=False), X, f, y)
    rescaled = load(folder)
    compare(rescaled, X, f * BASE["W_dec"].norm(dim=1), y)
    torch.testing.assert_close(rescaled.write_directions(range(N)).norm(dim=1), torch.ones(N))


def cross_layer(grouping: str, tmp_path: Path) -> tuple[Path, Any, Any]:
    """Store one CLT as F9 (decoders by source), F6 (by target) or F3; return it as formulas."""
    w_enc = [draw(N, D, seed=20 + i) / 3 for i in range(LAYERS)]
    b_enc = [draw(N, seed=30 + i) / 5 for i in range(LAYERS)]
    b_dec = [draw(D, seed=40 + i) for i in range(LAYERS)]
    theta = [draw(N, seed=50 + i).abs() / 2 for i in range(LAYERS)]
    w_dec = {
        (i, j): draw(N, D, seed=60 + 10 * i + j) / 3
        for i in range(LAYERS)
        for j in range(i, LAYERS)
    }
    if grouping == "F9":
        for i in range(LAYERS):
            encoder = {f"W_enc_{i}": w_enc[i], f"b_enc_{i}": b_enc[i], f"b_dec_{i}": b_dec[i],
                       f"threshold_{i}": theta[i]}  # fmt: skip
            store(tmp_path / f"W_enc_{i}.safetensors", encoder, {}, "x.json")
            decoder = torch.stack([w_dec[i, j] for j in range(i, LAYERS)], dim=1)
            store(tmp_path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoder}, {}, "x.json")
        config = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    elif grouping == "F6":
        tensors = {
            "W_E": torch.stack([w.T for w in w_enc]), "b_E": torch.stack(b_enc),
            "activation_function.log_jumprelu_threshold": torch.stack(theta).log(),
        }  # fmt: skip
        for j in range(LAYERS):
            tensors[f"W_D.{j}"] = torch.stack([w_dec[i, j] for i in range(j + 1)])
            tensors[f"b_D.{j}"] = b_dec[j]
        hooks = [f"blocks.{i}.hook_resid_mid" for i in range(LAYERS)]
        out = [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
        config = {"sae_type": "clt", "act_fn": "jumprelu", "hook_points_in": hooks,
                  "hook_points_out": out}  # fmt: skip
        store(tmp_path / "sae_weights.safetensors", tensors, config, "config.json")
    else:
        for i in range(LAYERS):
            whole = torch.zeros(N, LAYERS, D, dtype=torch.float64)
            for j in range(i, LAYERS):
                whole[:, j] = w_dec[i, j]
            tensors = {"w_enc": w_enc[i].T, "b_enc": b_enc[i], "w_dec": whole, "b_dec": b_dec[i],
                       "threshold": theta[i]}  # fmt: skip
            folder = tmp_path / "clt" / f"layer_{i}_width_16k_l0_medium"
            config = {
                "hf_hook_point_in": f"model.layers.{i}.pre_feedforward_layernorm.output",
                "hf_hook_point_out": f"model.layers.{i}.post_feedforward_layernorm.output",
            }
            store(folder / "params.safetensors", tensors, config, "config.json")

    def features(i: int, x: Tensor) -> Tensor:
        pre = x @ w_enc[i].T + b_enc[i]
        return pre.relu() * (pre > theta[i])

    def outputs(xs: list[Tensor], j: int) -> Tensor:
        return sum(features(i, xs[i]) @ w_dec[i, j] for i in range(j + 1)) + b_dec[j]

    return tmp_path, features, outputs


@pytest.mark.parametrize("grouping", ["F9", "F6", "F3"])
def test_cross_layer_transcoders_add_what_every_layer_below_writes(
    grouping: str, tmp_path: Path
) -> None:
    folder, features, outputs = cross_layer(grouping, tmp_path)
    dictionaries = open_set(folder).load()
    assert dictionaries.layers == (0, 1, 2)
    xs = [2 * draw(ROWS, D, seed=70 + i) for i in range(LAYERS)]
    written = {j: torch.zeros(ROWS, D) for j in range(LAYERS)}
    for dictionary in dictionaries:
        i = dictionary.layer
        f = dictionary.encode(xs[i].float())
        torch.testing.assert_close(f.double(), features(i, xs[i]), rtol=1e-5, atol=1e-5)
        assert [site.layer for site in dictionary.writes] == list(range(i, LAYERS))
        assert dictionary.writes[0].kind == "mlp_out"
        for slot, site in enumerate(dictionary.writes):
            written[site.layer or 0] += dictionary.decode(f, to=slot)
        rows = dictionary.write_directions([3, 1], to=LAYERS - 1 - i)
        lazy = open_set(folder)[i].write_directions([3, 1], to=LAYERS - 1 - i)
        assert torch.equal(rows, lazy)
    for j in range(LAYERS):
        torch.testing.assert_close(written[j].double(), outputs(xs, j), rtol=1e-5, atol=1e-4)


def test_f13_predicts_from_earlier_tokens(tmp_path: Path) -> None:
    heads, inner, s, pos = 2, 10, 1.3, 7
    tensors = {"D": BASE["W_dec"], "E": draw(N, D, seed=80) * 20, "b": BASE["b_dec"]}
    for layer in range(2):
        for name, out in (("q_target", inner), ("k_ctx", inner), ("v_ctx", N), ("c_proj", N)):
            seed = 90 + 10 * layer
            tensors[f"attn_layers.{layer}.{name}.weight"] = draw(out, N, seed=seed) / 4
            tensors[f"attn_layers.{layer}.{name}.bias"] = draw(out, seed=seed + 1) / 4
    config = {"sae": {"n_heads": heads, "n_attn_layers": 2, "kval_topk": K, "tied_weights": False,
                      "scaling_factor": s}}  # fmt: skip
    folder = store(tmp_path / "layer_1" / "latest_ckpt.safetensors", tensors, config, "conf.yaml")
    x = draw(2, pos, D, seed=99)
    left, codes = x * s, torch.zeros(2, pos, N, dtype=torch.float64)
    lam, w_enc = 1 / (4 * D), tensors["E"].T
    for layer in range(2):
        weights = {
            name: (
                tensors[f"attn_layers.{layer}.{name}.weight"],
                tensors[f"attn_layers.{layer}.{name}.bias"],
            )
            for name in ("q_target", "k_ctx", "v_ctx", "c_proj")
        }
        z = (lam * left @ w_enc).relu()
        context = torch.cat((torch.zeros(2, 1, N), z[:, :-1]), dim=1)
        mixed = torch.zeros_like(z)
        for batch in range(2):
            q = z[batch] @ weights["q_target"][0].T + weights["q_target"][1]
            k = context[batch] @ weights["k_ctx"][0].T + weights["k_ctx"][1]
            v = context[batch] @ weights["v_ctx"][0].T + weights["v_ctx"][1]
            for head in range(heads):
                a, b = inner // heads * head, N // heads * head
                scores = q[:, a : a + inner // heads] @ k[:, a : a + inner // heads].T
                scores = scores / sqrt(inner // heads)
                scores = scores.masked_fill(torch.ones(pos, pos).triu(1).bool(), float("-inf"))
                part = v[:, b : b + N // heads]
                mixed[batch, :, b : b + N // heads] = scores.softmax(-1) @ part
        z_pred = (mixed @ weights["c_proj"][0].T + weights["c_proj"][1]).relu()
        direction = z_pred @ tensors["D"]
        size = direction.norm(dim=-1, keepdim=True) + 1e-6
        scale = (direction * left).sum(-1, keepdim=True) / size**2
        codes, left = codes + z_pred * scale, left - scale * direction
    novel = topk((lam * left @ w_enc).relu())
    y = ((novel + codes) @ tensors["D"] + tensors["b"]) / s
    dictionary = load(folder)
    compare(dictionary, x, novel, y)
    with pytest.raises(DictionaryError, match="no single direction"):
        dictionary.read_rows([0])
