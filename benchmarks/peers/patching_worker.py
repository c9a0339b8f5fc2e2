"""TransformerLens' activation patching of resid_pre, answering one request per line.

Runs in the peer's own environment: ``python -m benchmarks.peers.patching_worker FOLDER``. A request
is {"clean", "corrupt", "answer", "foil", "every"}; with every > 1 only each so many-th cell is run.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge


def main() -> None:
    torch.set_num_threads(2)
    model = TransformerBridge.boot_transformers(sys.argv[1], device="cpu", dtype=torch.float32)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(model, json.loads(line))), flush=True)


def _answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    clean, corrupt = (torch.tensor([request[name]]) for name in ("clean", "corrupt"))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, request["answer"]] - logits[0, -1, request["foil"]]

    cells = list(itertools.product(range(model.cfg.n_layers), range(clean.shape[1])))
    start = time.perf_counter()
    _, cache = model.run_with_cache(clean, names_filter=lambda name: name.endswith("resid_pre"))
    if request["every"] == 1:
        values = patching.get_act_patch_resid_pre(model, corrupt, cache, metric).flatten()
        return {"seconds": time.perf_counter() - start, "values": values.tolist()}
    begin = time.perf_counter()
    frame = pd.DataFrame(cells[:: request["every"]], columns=["layer", "pos"])
    values = patching.generic_activation_patch(
        model,
        corrupt,
        cache,
        metric,
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=frame,
    )
    per_cell = (time.perf_counter() - begin) / len(frame)
    seconds = begin - start + per_cell * len(cells)
    return {"seconds": seconds, "values": values.flatten().tolist()}


if __name__ == "__main__":
    main()
