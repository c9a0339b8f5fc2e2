"""layerscope's own fit of a tuned lens in a process of its own: one fit, then one JSON line."""

from __future__ import annotations

import argparse
import json
import time

from benchmarks.harness import peak_rss_bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--positions", type=int, required=True)
    given = parser.parse_args()

    # The code of models: the trainer, too, imports it before its clock starts.
    import torch
    import transformers.generation.utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    import layerscope.models.backends.huggingface.opening
    import layerscope.models.backends.transformer_lens.structure  # noqa: F401
    from layerscope.lenses.fitting import DataConfig, TunedOptions, fit_lens
    from layerscope.models import load

    torch.set_num_threads(given.threads)
    before, started = peak_rss_bytes(), time.perf_counter()
    model = load(given.model, device="cpu", dtype="float32")
    data = DataConfig(
        tokens=given.tokens,
        evaluation_tokens=8192,
        context=given.context,
        positions=given.positions,
        batch=given.batch,
    )
    fit_lens(
        "tuned",
        model,
        given.text,
        given.out,
        data=data,
        options=TunedOptions(baseline=False),
    )
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {"seconds": seconds, "peak": peak_rss_bytes(), "extra": peak_rss_bytes() - before}
        )
    )


if __name__ == "__main__":
    main()
