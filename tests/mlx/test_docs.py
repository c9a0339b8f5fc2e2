"""The page on MLX runs as written, and names every family of the table."""

from __future__ import annotations

import re

from layerscope.models.backends.mlx.families import FAMILIES
from support.mlx_models import mlx
from support.shared import REPOSITORY

TEXT = (REPOSITORY / "docs" / "mlx.md").read_text("utf-8")


def test_the_page_runs_as_written(capsys):
    mlx()
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "docs/mlx.md", "exec"), names)
    assert blocks and "llama, 8 layers" in capsys.readouterr().out
    assert names["result"].logits.isfinite().all()


def test_every_family_is_named():
    table = TEXT.split("| Family |")[1].split("\n\n")[0]
    assert [family.name for family in FAMILIES if f"`{family.name}`" not in table] == []
