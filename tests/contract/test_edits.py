"""Edits against references that share no code with them: plain hooks and plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from layerscope.models import (
    Add,
    Apply,
    Clamp,
    MeanAblate,
    ProjectOut,
    Replace,
    ResampleAblate,
    Scale,
    Site,
    Start,
    ZeroAblate,
)
from support.loaded import EVERY, SEQUENCES, batch_of, hf, loaded, real, state_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
D = 32


def vector(seed=0, *shape):
    return torch.randn(*(shape or (D,)), generator=torch.Generator().manual_seed(seed))


def reference(edit, x):
    """Return what an edit means for a whole unpadded activation [batch, pos, d], in plain terms."""
    if isinstance(edit, Add):
        return x + edit.coefficient * edit.value
    if isinstance(edit, Replace):
        return edit.value.expand(x.shape)
    if isinstance(edit, Scale):
        return x * edit.factor
    if isinstance(edit, ZeroAblate):
        return x * 0
    if isinstance(edit, MeanAblate):
        return (x.mean((0, 1)) if edit.mean is None else edit.mean).expand(x.shape)
    if isinstance(edit, ResampleAblate):
        return x[list(edit.from_rows)]
    if isinstance(edit, ProjectOut):
        a = edit.directions.double().T
        return x - (x.double() @ a @ torch.linalg.pinv(a)).float()
    u = edit.direction / edit.direction.norm()
    c = x @ u
    return x + (c.clamp(edit.minimum, edit.maximum) - c)[..., None] * u


EDITS = {
    "add": lambda site: Add(site, vector(1), coefficient=2.5),
    "replace": lambda site: Replace(site, vector(2)),
    "scale": lambda site: Scale(site, -0.7),
    "zero": lambda site: ZeroAblate(site),
    "mean": lambda site: MeanAblate(site),
    "given_mean": lambda site: MeanAblate(site, vector(3)),
    "resample": lambda site: ResampleAblate(site, from_rows=(1, 0)),
    "project": lambda site: ProjectOut(site, vector(4, 3, D)),
    "clamp": lambda site: Clamp(site, vector(5), minimum=-0.2, maximum=0.1),
}

# Where a plain hook finds each site; the modules are named here by hand.
HAND = {
    "llama": {
        "embed": ("model.embed_tokens", "output"),
        "resid_pre.1": ("model.layers.1", "input"),
        "attn_out.1": ("model.layers.1.self_attn", "output"),
        "mlp_out.1": ("model.layers.1.mlp", "output"),
        "resid_post.1": ("model.layers.1", "output"),
        "mlp_in.1": ("model.layers.1.mlp", "input"),
        "final_norm": ("model.norm", "output"),
    },
    "gemma2": {
        "attn_out.1": ("model.layers.1.post_attention_layernorm", "output"),
        "mlp_out.1": ("model.layers.1.post_feedforward_layernorm", "output"),
        "resid_post.1": ("model.layers.1", "output"),
    },
    "gpt2": {
        "attn_out.1": ("transformer.h.1.attn", "output"),
        "mlp_out.1": ("transformer.h.1.mlp", "output"),
        "resid_pre.1": ("transformer.h.1", "input"),
    },
    "gpt_neox": {"mlp_out.1": ("gpt_neox.layers.1.mlp", "output")},
}
PLACES = [(family, site) for family, sites in HAND.items() for site in sites]


def hand_hooked(model, ids, name, side, change):
    module = hf(model).get_submodule(name)

    def on_input(_, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def on_output(_, args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = (
        module.register_forward_pre_hook(on_input, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(on_output)
    )
    try:
        with torch.no_grad():
            return hf(model)(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "site"), PLACES)
@pytest.mark.parametrize("kind", tuple(EDITS))
def test_every_edit_is_what_a_plain_hook_does(family, site, kind):
    model = loaded(family)
    ids = torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    edit = EDITS[kind](site)
    result = model.run(ids, edits=[edit], capture=site)
    expected = hand_hooked(model, ids, *HAND[family][site], lambda x: reference(edit, x))
    assert not torch.allclose(expected, model.run(ids).logits, atol=1e-3)
    torch.testing.assert_close(result.logits, expected, **CLOSE)
    # The capture of an edited site sees the value after the edit.
    plain = model.run(ids, capture=site)[site]
    torch.testing.assert_close(result[site], reference(edit, plain), **CLOSE)


@pytest.mark.parametrize("family", EVERY)
def test_edits_enter_the_residual_stream_where_they_say(family):
    """The sums of the residual stream hold after an edit of any of its terms."""
    model, batch = loaded(family), batch_of(0)
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = [site for site in model.sites() if site.layer == 1 and site.kind in kinds]
    for site in sites:
        result = model.run(batch, edits=[Add(site, vector(7))], capture=["*_*.1", "resid_pre.2"])
        plain = model.run(batch, capture=site)[site]
        torch.testing.assert_close(result[site], plain + vector(7), **CLOSE)
        total = result["resid_pre.1"] + result["attn_out.1"]
        if "resid_mid.1" in result:
            if site.kind != "resid_mid":
                torch.testing.assert_close(result["resid_mid.1"], total, **CLOSE)
            total = result["resid_mid.1"]
        total = total + result["mlp_out.1"]
        if site.kind != "resid_post":
            torch.testing.assert_close(result["resid_post.1"], total, **CLOSE)
        assert torch.equal(result["resid_pre.2"], result["resid_post.1"])
        resumed = model.run(batch, start=Start(2, result["resid_post.1"]))
        torch.testing.assert_close(result.logits, resumed.logits, **CLOSE)


@pytest.mark.parametrize("family", EVERY)
def test_an_edit_that_changes_nothing_is_bit_exact(family):
    model, batch = loaded(family), batch_of(side="left")
    before = state_of(hf(model))
    plain = model.run(batch).logits
    for site in ("embed", "resid_pre.*", "attn_out.1", "mlp_out.*", "resid_post.0", "final_norm"):
        for edit in (
            Add(site, torch.zeros(D)),
            Add(site, vector(), coefficient=0.0),
            Add(site, vector(), positions=[1, -1], rows=[0, 2], coefficient=0.0),
            Scale(site, 1.0),
            Clamp(site, vector(), minimum=-1e4),
            Apply(site, lambda x, _: x),
        ):
            assert torch.equal(model.run(batch, edits=[edit]).logits, plain), (site, edit)
    if model.backend.why_not(Site("resid_mid", 1)) is None:
        assert torch.equal(model.run(batch, edits=[Scale("resid_mid.1", 1.0)]).logits, plain)
    assert state_of(hf(model)) == before


ROW_EDITS = [
    Add("resid_post.0", vector(1), positions=-1),
    Replace("attn_out.1", vector(2, 2, D), positions=[0, -2]),
    Scale("resid_mid.1", 0.3, positions=[2]),
]


@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2", "gemma2", "gemma3", "olmo2"))
@pytest.mark.parametrize("side", ("right", "left"))
def test_one_padded_batch_holds_different_interventions(family, side):
    from dataclasses import replace

    model, batch = loaded(family), batch_of(side=side)
    edits = [replace(edit, rows=[row]) for row, edit in enumerate(ROW_EDITS)]
    together = model.run(batch, edits=edits, logits="last", capture="resid_post.*")
    for row, edit in enumerate(ROW_EDITS):
        alone = model.run(batch_of(row), edits=[edit], logits="last", capture="resid_post.*")
        torch.testing.assert_close(together.logits[row], alone.logits[0], **CLOSE)
        for site in alone:
            torch.testing.assert_close(real(together[site], batch, row), alone[site][0], **CLOSE)


def test_positions_and_rows_select_exactly_what_they_name():
    model, batch = loaded("llama"), batch_of(side="left")
    plain = model.run(batch, capture="resid_post.1")["resid_post.1"]
    edit = Add("resid_post.1", vector(), rows=[0, -1], positions=[[0, 3], [-1, 2]])
    edited = model.run(batch, edits=[edit], capture="resid_post.1")["resid_post.1"]
    moved = (edited != plain).any(-1)
    expected = torch.zeros_like(moved)
    expected[0, [0, 3]] = True  # nine tokens, no padding
    expected[2, [2 + 6, 2 + 2]] = True  # seven tokens after two of padding
    assert torch.equal(moved, expected)


def test_edits_of_one_site_apply_in_order():
    model, batch = loaded("llama"), batch_of(0)
    plain = model.run(batch, capture="mlp_out.0")["mlp_out.0"]
    add, scale = Add("mlp_out.0", vector()), Scale("mlp_out.0", 3.0)
    one = model.run(batch, edits=[add, scale], capture="mlp_out.0")["mlp_out.0"]
    other = model.run(batch, edits=[scale, add], capture="mlp_out.0")["mlp_out.0"]
    torch.testing.assert_close(one, (plain + vector()) * 3, **CLOSE)
    torch.testing.assert_close(other, plain * 3 + vector(), **CLOSE)


def test_values_of_the_caller_are_left_alone_and_may_have_any_dtype():
    model, batch = loaded("llama"), batch_of(0)
    for dtype in (torch.float64, torch.bfloat16):
        value = vector().to(dtype).requires_grad_()
        kept = value.detach().clone()
        result = model.run(
            batch,
            edits=[Replace("resid_post.0", value), Add("resid_post.1", value)],
            capture="resid_post.*",
        )
        assert torch.equal(value, kept) and value.grad is None
        assert (
            result["resid_post.0"].dtype == torch.float32 and result.logits.dtype == torch.float32
        )
    stored = model.run(batch, capture="resid_pre.1")["resid_pre.1"]
    kept = stored.clone()
    edits = [Scale("resid_pre.1", 2.0), Scale("resid_mid.1", 2.0)]
    model.run(batch, start=Start(1, stored), edits=edits)
    assert torch.equal(stored, kept)


def test_results_share_no_memory_with_the_values_of_edits():
    model, batch = loaded("llama"), batch_of(0)
    value = vector(1, 1, batch.width, D)
    for edit in (
        Replace("resid_post.1", value),
        MeanAblate("resid_post.1", value),
        Apply("resid_post.1", lambda x, _: value),
    ):
        result = model.run(batch, edits=[edit], capture="resid_post.1")
        assert torch.equal(result["resid_post.1"], value)
        assert result["resid_post.1"].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("kind", tuple(EDITS))
def test_tensors_that_others_hold_are_left_alone(kind):
    """The stored residual of a start, and a capture that is the same tensor in the model."""
    model, ids = loaded("llama"), torch.tensor([SEQUENCES[0], SEQUENCES[0][::-1]])
    edit = EDITS[kind]("resid_pre.1")
    plain = model.run(ids, capture="resid_post.0")["resid_post.0"]
    kept = plain.clone()
    edited = model.run(ids, edits=[edit], capture=["resid_post.0", "resid_pre.1"])
    assert torch.equal(edited["resid_post.0"], kept)
    assert not torch.equal(edited["resid_pre.1"], kept)
    model.run(ids, start=Start(1, plain), edits=[edit, EDITS[kind]("resid_mid.1")])
    assert torch.equal(plain, kept)


def test_a_function_gets_a_copy_and_the_context():
    model, batch = loaded("llama"), batch_of(side="left")
    seen = {}

    def change(x, context):
        seen.update(shape=tuple(x.shape), mask=context.mask, rows=context.rows.tolist())
        seen["before"] = context.activation[context.rows[:, None], context.columns].clone()
        x[:] = 5.0  # in place: a copy, so captures of the same tensor stay right
        return x

    result = model.run(
        batch,
        edits=[Apply("resid_pre.1", change, rows=[1, 2], positions=[0, -1])],
        capture=["resid_post.0", "resid_pre.1"],
    )
    plain = model.run(batch, capture="resid_post.0")["resid_post.0"]
    assert torch.equal(result["resid_post.0"], plain)
    assert seen["shape"] == (2, 2, D) and seen["mask"].all() and seen["rows"] == [1, 2]
    assert (result["resid_pre.1"] == 5.0).all(-1).sum() == 4
    assert torch.equal(seen["before"][:, 1], plain[1:, -1])


def test_a_function_may_run_the_model_and_is_not_seen_by_it():
    model, batch = loaded("llama"), batch_of(0)
    plain = model.run(batch, capture="resid_post.*")
    inside = []

    def nested(x, context):
        run = model.run(batch, edits=[Scale("resid_post.1", 1.0)], capture="resid_post.*")
        with torch.no_grad():
            direct = hf(model)(input_ids=batch.ids, use_cache=False).logits
        start = model.run(batch, start=Start(2, plain["resid_post.1"]))
        inside.extend([run.logits, direct, start.logits])
        return x * 2

    result = model.run(batch, edits=[Apply("resid_post.0", nested)], capture="resid_post.*")
    assert len(inside) == 3
    for logits in inside:
        torch.testing.assert_close(logits, plain.logits, **CLOSE)
    expected = model.run(batch, edits=[Scale("resid_post.0", 2.0)], capture="resid_post.*")
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result["resid_post.0"], 2 * plain["resid_post.0"])


def test_a_resumed_run_may_nest_another():
    model, batch = loaded("gpt2"), batch_of(0)
    plain = model.run(batch, capture="resid_pre.*")
    inside = []

    def nested(x, context):
        inside.append(model.run(batch).logits)
        inside.append(model.run(batch, start=Start(1, plain["resid_pre.1"])).logits)
        return x

    before = state_of(hf(model))
    edits = [Apply("resid_post.2", nested)]
    result = model.run(batch, start=Start(2, plain["resid_pre.2"]), edits=edits)
    for logits in (result.logits, *inside):
        torch.testing.assert_close(logits, plain.logits, **CLOSE)
    assert state_of(hf(model)) == before


def test_the_mean_is_over_real_tokens_only():
    model, batch = loaded("gpt2"), batch_of(side="left")
    plain = model.run(batch, capture="resid_post.0")["resid_post.0"]
    edited = model.run(batch, edits=[MeanAblate("resid_post.0")], capture="resid_post.0")
    expected = torch.cat([real(plain, batch, row) for row in range(3)]).mean(0)
    torch.testing.assert_close(real(edited["resid_post.0"], batch, 1)[3], expected, **CLOSE)


def test_resampling_pairs_positions_of_unequal_prompts():
    model, batch = loaded("llama"), batch_of()
    plain = model.run(batch, capture="mlp_out.1")["mlp_out.1"]
    edit = ResampleAblate("mlp_out.1", from_rows=(2,), rows=0, positions=[1, -1])
    edited = model.run(batch, edits=[edit], capture="mlp_out.1")["mlp_out.1"]
    assert torch.equal(edited[0, 1], plain[2, 1])
    assert torch.equal(edited[0, 8], plain[2, 6])  # the last tokens of nine and of seven
    drawn = ResampleAblate("mlp_out.1", seed=3, positions=-1)
    sources = drawn.sources([0, 1, 2], 3)
    assert all(source != row for row, source in enumerate(sources))
    assert sources == ResampleAblate("mlp_out.2", seed=3).sources([0, 1, 2], 3)
    edited = model.run(batch, edits=[drawn], capture="mlp_out.1", positions=-1)["mlp_out.1"]
    last = torch.stack([real(plain, batch, row)[-1] for row in range(3)])
    assert torch.equal(edited[:, 0], last[sources])


def test_gradients_flow_through_every_edit_of_the_middle_residual():
    model, batch = loaded("llama"), batch_of(0)
    value = vector().requires_grad_()
    edits = [Apply("resid_mid.1", lambda x, _: x * x), Add("resid_mid.1", value)]
    result = model.run(batch, edits=edits, gradients=True)
    result.logits[0, -1, 3].backward()
    step = 1e-2 * vector(9)
    with torch.no_grad():
        up = model.run(batch, edits=[edits[0], Add("resid_mid.1", value + step)]).logits[0, -1, 3]
        down = model.run(batch, edits=[edits[0], Add("resid_mid.1", value - step)]).logits[0, -1, 3]
    torch.testing.assert_close((up - down) / 2, value.grad @ step, rtol=1e-2, atol=1e-3)
    hf(model).zero_grad()


def test_logits_can_be_edited():
    model, batch = loaded("gemma2"), batch_of(side="left")
    plain = model.run(batch).logits
    edited = model.run(batch, edits=[Scale("logits", 2.0, rows=[1], positions=-1)]).logits
    assert torch.equal(edited[1, -1], 2 * plain[1, -1])
    assert torch.equal(edited[0], plain[0])
