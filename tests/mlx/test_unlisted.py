"""Families of mlx-lm that no row describes: found by their structure, proved, and compared."""

from __future__ import annotations

import pytest
import torch

import layerscope
from support.loaded import SEQUENCES, batch_of
from support.mlx_models import folder, mlx

# Scales of the embedding, the branches and the logits; parallel blocks; norms after; windows.
FAMILIES = ("stablelm", "stablelm_parallel", "granite", "cohere", "cohere2", "phi", "olmo3")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unlisted_family_is_what_hugging_face_has(family):
    mlx()
    with pytest.warns(UserWarning, match="nobody compared it with Hugging Face"):
        model = layerscope.load(folder(family), backend="mlx")
    assert model.family == f"structure:{family.removesuffix('_parallel')}"
    hf, batch = layerscope.load(folder(family)), batch_of(side="left")
    sites = model.sites()
    assert {site.kind for site in hf.sites()} == {site.kind for site in sites}
    expected, found = hf.run(batch, capture=sites), model.run(batch, capture=sites)
    for site in sites:
        a, b = (r[site].movedim(site.pos_axis, 1)[batch.attention_mask] for r in (found, expected))
        assert torch.equal(a.isneginf(), b.isneginf())
        a, b = a.masked_fill(a.isneginf(), 0.0), b.masked_fill(b.isneginf(), 0.0)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4, site
    start = model.run(batch, keep_cache=True, logits=None)
    later = model.run([[5], [6], [7]], cache=start.cache, logits="last").logits
    longer = [[*row, 5 + index] for index, row in enumerate(SEQUENCES)]
    whole = hf.run(longer, logits="last").logits
    torch.testing.assert_close(later, whole, rtol=1e-4, atol=5e-5)
