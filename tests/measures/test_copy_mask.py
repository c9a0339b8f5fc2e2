from __future__ import annotations

import pytest

from layerscope.errors import TableError
from layerscope.measures.copy_mask import SAMPLE, copy_mask


def test_what_the_mask_holds() -> None:
    texts = ["<s>", ",", " the", "\n", None, "。", "", "�"]
    found = copy_mask(texts)
    assert found["ignored_token_ids"] == [1, 3, 5]
    assert found["ignored_token_str_sample"] == [",", "\n", "。"]
    assert (found["size"], found["share"], found["d_vocab"]) == (3, 0.375, 8)
    many = copy_mask([","] * 40)
    assert (len(many["ignored_token_str_sample"]), many["size"]) == (SAMPLE, 40)
    with pytest.raises(TableError, match="no texts"):
        copy_mask([])
