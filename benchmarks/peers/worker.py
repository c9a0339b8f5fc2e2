"""One contender in one process: loads the model, then runs the job once for every line on stdin.

Runs inside the peer's own environment, so it imports nothing of the project but, for our own
contender, layerscope itself. Protocol: prints {"ready": ...}, then for each line "run" prints
{"seconds": ..., "peak_rss": ...}; "check" prints the entropies in bits of the lens rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from benchmarks.peers.inputs import TOP_K, token_ids  # noqa: E402

LN2 = 0.6931471805599453


def peak_rss() -> int:
    """Return VmHWM: what getrusage tells begins at the peak of the process that started this."""
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) * 1024


def huggingface(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def hf_forward(folder: str, tokens: int) -> Callable[[], Any]:
    model = huggingface(folder)
    ids = token_ids(model.config.vocab_size, tokens)
    return lambda: model(ids, use_cache=False).logits


def hf_naive_lens(folder: str, tokens: int) -> Callable[[], Any]:
    """What one writes by hand: hidden states, norm, one unembedding per layer, softmax."""
    model = huggingface(folder)
    ids = token_ids(model.config.vocab_size, tokens)

    def run() -> torch.Tensor:
        out = model(ids, use_cache=False, output_hidden_states=True)
        final = out.logits.float().log_softmax(-1)
        entropies = []
        for hidden in out.hidden_states[1:]:
            normed = hidden if hidden is out.hidden_states[-1] else model.model.norm(hidden)
            log_probs = model.lm_head(normed).float().log_softmax(-1)
            probs = log_probs.exp()
            entropies.append(-(probs * log_probs).sum(-1)[0] / LN2)
            _ = (probs * (log_probs - final)).sum(-1)
            _ = probs.topk(TOP_K, -1)
        return torch.stack(entropies)

    return run


def hf_last_per_layer(folder: str, tokens: int) -> Callable[[], Any]:
    """Last position only, one unembedding per layer; the forward pass is not part of the job."""
    model = huggingface(folder)
    ids = token_ids(model.config.vocab_size, tokens)
    hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states

    def run() -> torch.Tensor:
        rows = []
        for number, states in enumerate(hidden):
            last = states[:, -1] if number == len(hidden) - 1 else model.model.norm(states[:, -1])
            log_probs = model.lm_head(last).float().log_softmax(-1)
            probs = log_probs.exp()
            rows.append(-(probs * log_probs).sum(-1)[0] / LN2)
            _ = probs.topk(TOP_K, -1)
        return torch.stack(rows)

    return run


def bridge(folder: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device="cpu")


def tl_forward(folder: str, tokens: int) -> Callable[[], Any]:
    model = bridge(folder)
    ids = token_ids(model.cfg.d_vocab, tokens)
    return lambda: model(ids)


def tl_capture(folder: str, tokens: int) -> Callable[[], Any]:
    model = bridge(folder)
    ids = token_ids(model.cfg.d_vocab, tokens)

    def wanted(name: str) -> bool:
        return name.endswith("hook_resid_post") or name == "blocks.0.hook_resid_pre"

    return lambda: model.run_with_cache(ids, names_filter=wanted)


def tl_lens(folder: str, tokens: int) -> Callable[[], Any]:
    from transformer_lens.tools.analysis import logit_lens

    model = bridge(folder)
    ids = token_ids(model.cfg.d_vocab, tokens)

    def run() -> torch.Tensor:
        result = logit_lens(model, ids, positions=None, top_k=TOP_K, return_type="probs")
        return result.readout.entropy[1:, 0] / LN2

    return run


def nnterp_model(folder: str) -> Any:
    from nnterp import StandardizedTransformer

    return StandardizedTransformer(folder, device_map="cpu", dispatch=True)


def nnterp_capture(folder: str, tokens: int) -> Callable[[], Any]:
    model = nnterp_model(folder)
    ids = token_ids(model.vocab_size, tokens)

    def run() -> Any:
        with model.trace(ids):
            kept = list().save()  # noqa: C408
            for layer in range(model.num_layers):
                kept.append(model.layers_output[layer])
            logits = model.logits.save()
        return kept, logits

    return run


def nnterp_lens(folder: str, tokens: int) -> Callable[[], Any]:
    model = nnterp_model(folder)
    ids = token_ids(model.vocab_size, tokens)

    def run() -> torch.Tensor:
        with model.trace(ids):
            kept = list().save()  # noqa: C408
            states = []
            for layer in range(model.num_layers):  # a comprehension would leave the trace's scope
                states.append(model.layers_output[layer])  # noqa: PERF401
            final = model.logits.float().log_softmax(-1)
            for hidden in states:
                log_probs = model.project_on_vocab(hidden).float().log_softmax(-1)
                probs = log_probs.exp()
                entropy = -(probs * log_probs).sum(-1)[0]
                kept.append((entropy, (probs * (log_probs - final)).sum(-1), probs.topk(TOP_K, -1)))
        return torch.stack([row[0] for row in kept]) / LN2

    return run


def tuned_lens_lens(folder: str, tokens: int) -> Callable[[], Any]:
    import numpy as np
    from tuned_lens.nn.lenses import LogitLens
    from tuned_lens.plotting import PredictionTrajectory

    model = huggingface(folder)
    ids = token_ids(model.config.vocab_size, tokens)[0].tolist()
    lens = LogitLens.from_model(model).float().eval()

    def run() -> torch.Tensor:
        trajectory = PredictionTrajectory.from_lens_and_model(lens, model, ids)
        entropy = trajectory.entropy().stats
        trajectory.forward_kl()
        np.argpartition(trajectory.probs, -TOP_K, axis=-1)
        return torch.tensor(entropy[1:]) / LN2

    return run


CONTENDERS: dict[str, Callable[[str, int], Callable[[], Any]]] = {
    "huggingface:forward": hf_forward,
    "huggingface:lens": hf_naive_lens,
    "huggingface:last": hf_last_per_layer,
    "transformer-lens:forward": tl_forward,
    "transformer-lens:capture": tl_capture,
    "transformer-lens:lens": tl_lens,
    "nnterp:capture": nnterp_capture,
    "nnterp:lens": nnterp_lens,
    "tuned-lens:lens": tuned_lens_lens,
}


def serve(run: Callable[[], Any]) -> None:
    """Answer one JSON line for every command line on stdin."""
    run()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        gc.collect()
        start = time.perf_counter()
        value = run()
        seconds = time.perf_counter() - start
        answer: dict[str, Any] = {
            "seconds": seconds,
            "peak_rss": peak_rss(),
        }
        if line.strip() == "check" and isinstance(value, torch.Tensor):
            answer["values"] = value.double().flatten().tolist()
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.contender.startswith("layerscope:"):
        from benchmarks.peers.ours import CONTENDERS as OURS

        factory = OURS[options.contender]
    else:
        factory = CONTENDERS[options.contender]
    serve(factory(options.folder, options.tokens))


if __name__ == "__main__":
    main()
