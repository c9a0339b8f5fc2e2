"""The same request gives the same bits, whatever the hash seed and however many ask at once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from layerscope.models import Apply, Scale
from support.loaded import batch_of, hf, loaded, state_of

CAPTURES = (
    ["resid_post.*"],
    ["attn.*.pattern", "resid_mid.1"],
    ["attn.1.head.2.out", "attn.1.z", "mlp.1.post"],
    ["attn.0.kv_head.1.v", "attn.0.q"],
)
EDITS = (
    [],
    [Scale("attn.1.head.0.pattern", 0.5), Scale("attn.1.head.1.pattern", 0.5)],
    [Scale("attn.1.head.2.z", 2.0), Scale("attn.1.z", 0.5), Scale("attn.1.head.2.z", 2.0)],
    [Apply("mlp.1.post", lambda x, _: x.relu())],
)


def digest(request: int) -> str:
    """Return a hash of everything that one of the requests gives."""
    model = loaded("llama")
    result = model.run(
        batch_of(side=("left", "right")[request % 2]),
        capture=CAPTURES[request % 4],
        edits=EDITS[request // 4 % 4],
    )
    found = hashlib.sha256(result.logits.numpy().tobytes())
    for site in result:
        found.update(f"{site}".encode() + result[site].contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.filterwarnings("ignore:an edit of an attention pattern")
def test_eight_clients_at_once_get_what_each_would_get_alone():
    model = loaded("llama")
    before = state_of(hf(model))
    requests = [request % 16 for request in range(160)]
    alone = [digest(request) for request in range(16)]
    assert len(set(alone)) == 16
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(digest, requests))
    assert together == [alone[request] for request in requests]
    assert state_of(hf(model)) == before


@pytest.mark.slow
def test_hash_seeds_change_nothing():
    code = (
        "import warnings; warnings.simplefilter('ignore'); import torch; torch.set_num_threads(1); "
        "from contract.test_determinism import digest; "
        "print([digest(request) for request in range(16)])"
    )
    tests = Path(__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{tests}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(5)
    ]
    answers = {process.communicate()[0] for process in processes}
    assert len(answers) == 1 and "[" in answers.pop()


def test_a_batch_gives_each_row_what_it_gets_alone():
    model, batch = loaded("gemma2"), batch_of(side="left")
    sites = ["attn.*.z", "mlp.*.post", "attn.*.out", "attn.*.q"]
    together = model.run(batch, capture=sites)
    for row in range(len(batch)):
        alone = model.run(batch_of(row), capture=sites)
        real = batch.attention_mask[row]
        for site in alone:
            torch.testing.assert_close(
                together[site][row][real], alone[site][0], rtol=1e-5, atol=1e-5
            )
