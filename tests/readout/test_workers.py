"""Workers: order, errors, and torch's number of threads afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from layerscope.products import openmp
from layerscope.readout import Reference, Unembedding, fused, plan, readout
from layerscope.readout.workers import Workers


@pytest.fixture(autouse=True, params=["torch's threads", "a pool"])
def _three_threads(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Three threads, those of torch where they can be asked, or others beside them."""
    if request.param == "a pool":
        monkeypatch.setattr(openmp, "available", lambda: False)
    elif not openmp.available():
        pytest.skip("torch's threads cannot be asked here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_each_worker_keeps_to_itself() -> None:
    used: dict[int, set[int]] = {}

    def work(item: int, worker: int) -> int:
        used.setdefault(worker, set()).add(threading.get_ident())
        return item * item

    with Workers(3) as workers:
        assert workers.map(work, range(10), at_once=3) == [item * item for item in range(10)]
        assert workers.map(work, [5], at_once=3) == [25]
    assert set(used) == {0, 1, 2}
    assert torch.get_num_threads() == 3


def test_one_thread_for_each_worker() -> None:
    def threads(_item: int = 0, _worker: int = 0) -> int:
        return torch.get_num_threads()

    with Workers(3) as workers:
        assert threads() == 1
        assert workers.map(threads, range(6), at_once=3) == [1] * 6
    assert threads() == 3


def test_an_error_is_raised_after_all_have_stopped() -> None:
    finished: list[int] = []

    def work(item: int, worker: int) -> None:
        if item == 0:
            raise ZeroDivisionError
        finished.append(item)

    with Workers(3) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.map(work, range(4), at_once=2)
        assert finished == [1, 3]
    assert torch.get_num_threads() == 3


def test_an_interruption_in_a_worker_is_not_lost() -> None:
    def work(item: int, worker: int) -> None:
        if item == 2:
            raise KeyboardInterrupt

    with Workers(3) as workers, pytest.raises(KeyboardInterrupt):
        workers.map(work, range(3), at_once=3)


def test_gradients_are_off_in_workers() -> None:
    with torch.no_grad(), Workers(3) as workers:
        enabled = workers.map(lambda _item, _worker: torch.is_grad_enabled(), range(2), at_once=2)
    assert enabled == [False, False]


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_a_readout_in_inference_mode_is_the_same(kernels: fused.Kernels) -> None:
    if kernels == "fused":
        pytest.importorskip("numba")
    hidden, head = torch.randn(12, 16), Unembedding(torch.randn(800, 16))
    expected = readout(hidden, head, kernels=kernels)
    with torch.inference_mode():
        found = readout(hidden, head, kernels=kernels)
    assert found.entropy_bits is not None
    assert expected.entropy_bits is not None
    assert torch.equal(found.entropy_bits, expected.entropy_bits)


def test_an_accelerator_needs_no_workers() -> None:
    assert Workers.of(torch.device("cpu")).count == 3
    alone = Workers.of(torch.device("cuda"))
    assert alone.count == 1
    with alone:
        assert torch.get_num_threads() == 3  # left as they were


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_readout_does_not_depend_on_the_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 16, generator=generator)
    head = Unembedding(torch.randn(700, 16, generator=generator).requires_grad_())
    reference = Reference(index=54 + torch.arange(6).repeat(10))
    monkeypatch.setattr(plan, "_WORKING_SET", 10 * 700)  # one group of rows to each part
    torch.set_num_threads(1)
    alone = readout(hidden, head, reference=reference)
    torch.set_num_threads(threads)
    together = readout(hidden, head, reference=reference)
    assert torch.get_num_threads() == threads
    for name in ("entropy_bits", "top_ids", "top_log2p"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name))
    assert alone.reference is not None
    assert together.reference is not None
    for name in ("kl_to_bits", "kl_from_bits", "js_bits", "l1", "cosine"):
        torch.testing.assert_close(
            getattr(together.reference, name), getattr(alone.reference, name), atol=1e-5, rtol=1e-5
        )
