"""What a readout has been lent is lent again, one at a time, where the process keeps memory."""

from __future__ import annotations

import pytest
import torch

from layerscope.readout import Unembedding, buffers, readout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(buffers, "LARGEST_KEPT", 400)
    monkeypatch.setattr(buffers, "_free", [])
    monkeypatch.setattr(buffers, "keeps_freed_memory", lambda: True)


def test_the_same_memory_is_lent_again_and_one_buffer_is_kept() -> None:
    with buffers.lent(1000, CPU) as first, buffers.lent(500, CPU) as other:
        place = first.data_ptr()
        assert other.data_ptr() != place
        assert len(other) == 500
    with buffers.lent(900, CPU) as again:
        assert again.data_ptr() == place
        assert len(again) == 900
    with buffers.lent(2000, CPU) as larger:
        assert len(larger) == 2000
    assert [len(each) for each in buffers._free] == [2000]  # pyright: ignore[reportPrivateUsage]


def test_small_ones_and_those_of_a_process_that_keeps_nothing_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with buffers.lent(100, CPU):
        pass
    monkeypatch.setattr(buffers, "keeps_freed_memory", lambda: False)
    with buffers.lent(1000, CPU):
        pass
    assert buffers._free == []  # pyright: ignore[reportPrivateUsage]


def test_a_buffer_survives_an_error_and_serves_in_every_mode() -> None:
    places: list[int] = []
    with (
        pytest.raises(ZeroDivisionError),
        torch.inference_mode(),
        buffers.lent(1000, CPU) as one,
    ):
        places.append(one.data_ptr())
        raise ZeroDivisionError
    with buffers.lent(1000, CPU) as again:
        assert [again.data_ptr()] == places
        again.zero_().add_(1.0)


def test_readouts_that_share_a_buffer_are_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Unembedding(torch.randn(300, 16, generator=generator))
    first, second = (torch.randn(n, 16, generator=generator) for n in (40, 23))
    shared = [readout(each, head).entropy_bits for each in (first, second)]
    assert len(buffers._free) == 1  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(buffers, "keeps_freed_memory", lambda: False)
    for each, found in zip((first, second), shared, strict=True):
        expected = readout(each, head).entropy_bits
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
