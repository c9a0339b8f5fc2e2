"""One library in one process, with the plain model beside it.

    python -m benchmarks.peers.hooks.worker LIBRARY FOLDER

Runs inside the library's own environment. For every line of JSON on stdin it answers one: the jobs
it can do ("list"), whether a job's result is right ("check"), or how long it took ("run").
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402

from benchmarks.peers.hooks import huggingface  # noqa: E402
from benchmarks.peers.hooks.job import Input, Job, Library, Outcome  # noqa: E402

# Float32 sums in another order; a wrong result is off by whole logits.
TOLERANCE = 2e-3


class Server:
    """Holds a library and its jobs for every prompt length."""

    def __init__(self, name: str, library: Library, tokens: list[int]) -> None:
        package = "transformers" if name == "huggingface" else name
        self.version = importlib.metadata.version(package)
        self.library = library
        self.inputs = {count: Input.of(library.reference, count) for count in tokens}
        self.jobs = {count: self._jobs(given) for count, given in self.inputs.items()}

    def _jobs(self, given: Input) -> dict[str, Job]:
        model = self.library.reference
        bare = Job(lambda: model(given.ids, use_cache=False).logits, Outcome)
        return {"bare": bare, "bare, again": bare, **self.library.jobs(given)}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "list":
            jobs = list(next(iter(self.jobs.values())))
            return {"jobs": jobs, "version": self.version, **_attached(self.library.modules)}
        job = self.jobs[request["tokens"]][request["job"]]
        if request["do"] == "check":
            return self._check(job, request["job"], self.inputs[request["tokens"]])
        gc.collect()
        start = time.perf_counter()
        job.run()
        return {"seconds": time.perf_counter() - start}

    def _check(self, job: Job, name: str, given: Input) -> dict[str, Any]:
        try:
            outcome = job.read(job.run())
        # A peer's refusal is a result of the benchmark, whatever it raises.
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            return {"right": False, "why": f"{type(error).__name__}: {line}"}
        want = huggingface.expected(self.library.reference, given, name)
        if name == "decode, no edit":
            return {"right": True, "tokens": list(outcome.tokens)}
        if name == "decode":
            got, wanted = list(outcome.tokens), list(want.tokens)
            same = sum(ours == theirs for ours, theirs in zip(got, wanted, strict=False))
            right = got == wanted
            why = {} if right else {"why": f"{same} of {len(wanted)} tokens agree"}
            return {"right": right, "tokens": got, **why}
        assert outcome.logits is not None and want.logits is not None
        errors = {"logits": _difference(outcome.logits, want.logits)}
        if name in ("residuals", "every site"):
            missing = len(want.residuals) - len(outcome.residuals)
            if missing:
                return {"right": False, "why": f"{missing} residuals are missing"}
            errors["residuals"] = max(map(_difference, outcome.residuals, want.residuals))
        worst = max(errors, key=lambda part: errors[part])
        right = errors[worst] <= TOLERANCE
        size = sum(tensor.numel() * tensor.element_size() for tensor in outcome.kept)
        notes = {"kept_tensors": len(outcome.kept), "kept_bytes": size} if outcome.kept else {}
        why = {} if right else {"why": f"{worst} differ by {errors[worst]:.3g}"}
        return {"right": right, "max_abs_error": errors[worst], **notes, **why}


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.numel() != wanted.numel():
        return float("inf")
    return float((got.reshape(wanted.shape) - wanted).abs().max())


def _attached(model: torch.nn.Module) -> dict[str, int]:
    """Count what a library leaves on an idle model: hooks, and forwards of single modules."""
    hooks = forwards = 0
    for module in model.modules():
        hooks += len(module._forward_hooks) + len(module._forward_pre_hooks)
        forwards += "forward" in vars(module)
    return {"idle_hooks": hooks, "idle_forwards_replaced": forwards}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    name = options.library.replace("-", "_")
    library = importlib.import_module(f"benchmarks.peers.hooks.{name}").build(options.folder)
    # After loading: some libraries set their own.
    torch.set_num_threads(options.threads)
    server = Server(options.library, library, options.tokens)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
