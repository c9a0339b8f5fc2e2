from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope.errors import SiteError
from layerscope.models import Site
from layerscope.models.sites import (
    GLOBAL_KINDS,
    HEAD_KINDS,
    INNER_KINDS,
    KV_HEAD_KINDS,
    LAYER_KINDS,
    expand,
)

SITES = st.one_of(
    st.sampled_from(GLOBAL_KINDS).map(Site),
    st.builds(Site, st.sampled_from(LAYER_KINDS + INNER_KINDS), st.integers(-99, 99)),
    st.builds(Site, st.sampled_from(HEAD_KINDS), st.integers(-99, 99), st.integers(0, 99)),
    st.builds(
        Site,
        st.sampled_from(KV_HEAD_KINDS),
        st.integers(-99, 99),
        st.none(),
        st.integers(0, 99),
    ),
)


LEAVES = ("q_pre", "k_pre", "q", "k", "v", "scores", "pattern", "z", "out")


def names(patterns, available=None):
    if available is not None:
        available = set(available).__contains__
    found = expand(patterns, n_layers=4, n_heads=2, available=available)
    return [str(site) for site in found]


@given(SITES)
def test_names_round_trip(site):
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("embed", Site("embed")),
        ("resid_post.3", Site("resid_post", 3)),
        ("mlp_out.-1", Site("mlp_out", -1)),
        ("attn.3.z", Site("attn.z", 3)),
        ("attn.3.head.2.z", Site("attn.z", 3, 2)),
        ("attn.0.head.1.out", Site("attn.out", 0, 1)),
        ("mlp.2.pre", Site("mlp.pre", 2)),
        ("attn.3.kv_head.1.v", Site("attn.v", 3, kv_head=1)),
    ],
)
def test_the_grammar(name, site):
    assert Site.parse(name) == site
    assert str(site) == name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("hook_embed", "embed"),
        ("ln_final.hook_normalized", "final_norm"),
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("blocks.0.hook_resid_mid", "resid_mid.0"),
        ("blocks.2.hook_mlp_out", "mlp_out.2"),
        ("blocks.1.attn.hook_z", "attn.1.z"),
        ("blocks.1.attn.hook_pattern", "attn.1.pattern"),
        ("blocks.1.mlp.hook_post", "mlp.1.post"),
        ("blocks.1.attn.hook_q", "attn.1.q_pre"),
        ("blocks.1.attn.hook_rot_q", "attn.1.q"),
        ("mlp.1.gate", "mlp.1.pre"),
    ],
)
def test_names_of_transformer_lens(theirs, ours):
    assert Site.parse(theirs) == Site.parse(ours)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("resid_post.*", [f"resid_post.{layer}" for layer in range(4)]),
        ("resid_*.3", ["resid_pre.3", "resid_mid.3", "resid_post.3"]),
        ("mlp_out.-2:", ["mlp_out.2", "mlp_out.3"]),
        ("mlp_out.1:3", ["mlp_out.1", "mlp_out.2"]),
        ("blocks.*.hook_attn_out", [f"attn_out.{layer}" for layer in range(4)]),
        ("attn.1.head.*.z", ["attn.1.head.0.z", "attn.1.head.1.z"]),
        ("attn.1.*", [f"attn.1.{leaf}" for leaf in LEAVES]),
        (["embed", "resid_pre.-1", "resid_pre.3", "embed"], ["embed", "resid_pre.3"]),
        (Site("resid_pre", -4), ["resid_pre.0"]),
        ((), []),
    ],
)
def test_patterns(patterns, expected):
    assert names(patterns) == expected


def test_a_pattern_of_several_kinds_stands_for_those_available():
    available = [Site("resid_pre", 3), Site("resid_post", 3)]
    assert names("resid_*.3", available) == ["resid_pre.3", "resid_post.3"]
    assert names("resid_mid.3", available) == ["resid_mid.3"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_pots.3", r"unknown site 'resid_pots.3'; did you mean 'resid_post.3'"),
        ("residpost.*", r"did you mean 'resid_post.\*'"),
        ("attn.3.zz", r"did you mean 'attn.3.z'"),
        ("logit", r"did you mean 'logits'"),
        ("blocks.2.hook_resid_pst", r"did you mean 'blocks.2.hook_resid_post'"),
        ("blocks.2.attn.hook_rq", r"did you mean .*'blocks.2.attn.hook_q'"),
        ("attn.0.kv_head.0.z", "unknown site"),
        ("attn.0.kv_head.2.v", r"kv_head 2 of .* kv_heads 0 to 1"),
        ("resid_post", r"needs a layer: resid_post.0 .* resid_post.\*"),
        ("zzzz", r"see LanguageModel.sites\(\)"),
        ("resid_post.x", "unknown site"),
        ("resid_post.1:-", "unknown site"),
        ("attn.0.tail.1.z", "unknown site"),
        ("", "unknown site"),
        ("resid_post.4", r"layer 4 of 'resid_post.4' does not exist: .* layers 0 to 3"),
        ("resid_post.-5", "does not exist"),
        ("resid_post.3:2", "names no layer: this model has layers 0 to 3"),
        ("attn.0.head.2.z", r"head 2 of .* heads 0 to 1"),
    ],
)
def test_bad_names_say_what_would_be_right(name, message):
    with pytest.raises(SiteError, match=message) as caught:
        names(name)
    assert "\n" not in str(caught.value)


def test_one_site_is_not_a_pattern():
    with pytest.raises(SiteError, match="names several sites"):
        Site.parse("resid_post.*")
    with pytest.raises(SiteError, match="names several sites"):
        Site.parse("resid_*.1")
