"""A compiled loop is found again only while everything that it is made of is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("numba")

from layerscope.products import compiling, powers


def test_a_change_in_any_file_changes_the_stamp(tmp_path: Path) -> None:
    digest = compiling._digest.__wrapped__  # pyright: ignore[reportPrivateUsage]
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("x = 1\n")
    other.write_text("y = 1\n")
    before = digest(frozenset([tmp_path]))
    assert digest(frozenset([tmp_path])) == before
    other.write_text("y = 2\n")
    assert digest(frozenset([tmp_path])) != before


def test_a_loop_carries_the_stamp_in_its_name() -> None:
    folder = Path(compiling.__file__).parent
    stamp = compiling._digest(frozenset([folder]))  # pyright: ignore[reportPrivateUsage]
    assert powers.exp2.py_func.__qualname__ == f"exp2_{stamp}"  # pyright: ignore[reportFunctionMemberAccess]
