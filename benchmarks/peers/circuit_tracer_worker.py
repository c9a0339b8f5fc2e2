"""circuit-tracer in its own environment: an attribution graph of one prompt for every line.

    python circuit_tracer_worker.py MODEL TRANSCODERS.safetensors --features 128 ...

"run" builds the graph; "edges PATH" writes the last one's nodes and edges. The model is the
folder's Llama, moved into TransformerLens without a name, because names are looked up on the hub.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from circuit_tracer.attribution.attribute import attribute  # noqa: E402
from circuit_tracer.replacement_model.replacement_model_transformerlens import (  # noqa: E402
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.activation_functions import JumpReLU  # noqa: E402
from circuit_tracer.transcoder.single_layer_transcoder import (  # noqa: E402
    SingleLayerTranscoder,
    TranscoderSet,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from transformer_lens import HookedTransformerConfig  # noqa: E402
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from benchmarks.peers.inputs import token_ids  # noqa: E402


def transcoders(file: str, n_layers: int, d_model: int) -> TranscoderSet:
    held = load_file(file)
    made: dict[int, Any] = {}
    for layer in range(n_layers):
        encoder, decoder = held[f"{layer}.encoder"], held[f"{layer}.decoder"]
        gate = JumpReLU(held[f"{layer}.threshold"])
        one = SingleLayerTranscoder(
            d_model, len(encoder), gate, layer, device=torch.device("cpu"), dtype=torch.float32
        )
        one.W_enc.data, one.W_dec.data = encoder, decoder
        made[layer] = one
    return TranscoderSet(made, "mlp.hook_in", "mlp.hook_out")


def replacement(folder: str, file: str) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shape = model.config
    config = HookedTransformerConfig(
        n_layers=shape.num_hidden_layers,
        d_model=shape.hidden_size,
        d_head=shape.hidden_size // shape.num_attention_heads,
        n_heads=shape.num_attention_heads,
        n_key_value_heads=shape.num_key_value_heads,
        d_mlp=shape.intermediate_size,
        d_vocab=shape.vocab_size,
        n_ctx=256,
        eps=shape.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=shape.hidden_size // shape.num_attention_heads,
        rotary_base=10_000,
        original_architecture="LlamaForCausalLM",
        model_name="random",
        device="cpu",
    )
    held = transcoders(file, config.n_layers, config.d_model)
    words = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", bos_token="<bos>", pad_token="<pad>"
    )
    made = TransformerLensReplacementModel(config)
    made.tokenizer = words  # its own way would open the tokenizer again, by name
    made.load_state_dict(convert_llama_weights(model, config), strict=False)
    made._configure_replacement_model(held)
    ids = token_ids(shape.vocab_size, 16)
    with torch.no_grad():
        error = float((made(ids) - model(ids).logits).abs().max())
    if error > 1e-2:
        raise RuntimeError(f"TransformerLens' copy of the model differs by {error} in its logits")
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("transcoders")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--logits", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = replacement(given.model, given.transcoders)
    ids = token_ids(model.cfg.d_vocab, given.tokens)[0]
    graph: Any = None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        word, _, path = line.strip().partition(" ")
        if word == "edges":
            write(graph, Path(path))
            print(json.dumps({"written": path}), flush=True)
            continue
        started = time.perf_counter()
        graph = attribute(
            ids,
            model,
            max_n_logits=given.logits,
            batch_size=given.batch,
            max_feature_nodes=given.features,
        )
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def write(graph: Any, path: Path) -> None:
    """Rows of the adjacency are targets, columns sources: features, errors, tokens, logits."""
    save_file(
        {
            "features": graph.active_features[graph.selected_features].contiguous(),
            "adjacency": graph.adjacency_matrix.contiguous(),
        },
        path,
    )


if __name__ == "__main__":
    main()
