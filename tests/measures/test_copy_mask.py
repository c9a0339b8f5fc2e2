from __future__ import annotations

import pytest

from layerscope.errors import TableError
from layerscope.measures.copy_mask import SAMPLE, copy_mask


def test_what_the_mask_holds() -> None:
    found = copy_mask([1, 3], ["<s>", ",", " the", "\n"])
    assert found == {
        "ignored_token_ids": [1, 3],
        "ignored_token_str_sample": [",", "\n"],
        "size": 2,
        "share": 0.5,
        "d_vocab": 4,
    }
    many = copy_mask(range(40), [","] * 50)
    assert (len(many["ignored_token_str_sample"]), many["size"]) == (SAMPLE, 40)
    with pytest.raises(TableError, match="no texts"):
        copy_mask([], [])
