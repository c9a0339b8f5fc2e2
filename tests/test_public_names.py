from __future__ import annotations

import layerscope


def test_every_public_name_can_be_had() -> None:
    for name in layerscope.__all__:
        assert getattr(layerscope, name) is not None, name
    assert set(layerscope.__all__) == set(dir(layerscope))
