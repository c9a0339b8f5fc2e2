"""A model whose heads write nothing keeps its sites: an error of 0 in 0 disproves nothing."""

from __future__ import annotations

from support.toys import bare_gpt2


def test_all_zero_attention_keeps_its_patterns() -> None:
    model = bare_gpt2(n_layers=2, n_heads=2, d_model=8, d_mlp=4).model()
    pattern = model.run("t1 t2 t3 t4", capture="attn.1.pattern")["attn.1.pattern"]
    assert pattern[0, 0, 3].tolist() == [0.25, 0.25, 0.25, 0.25]
