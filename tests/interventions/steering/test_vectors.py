"""Vectors as they are applied, calibrated, scheduled and kept."""

from __future__ import annotations

import json

import pytest
import torch

from layerscope.errors import ConfigError, EditError, ModelError
from layerscope.interventions.steering.calibrate import calibrate, calibrate_kl, typical_norm
from layerscope.interventions.steering.contrasts import Contrast
from layerscope.interventions.steering.operations import AddKeepingNorm, scheduled
from layerscope.interventions.steering.states import read_states
from layerscope.interventions.steering.vector import SteeringVector, load_vector, save_vector
from layerscope.models import Add, Scope, TokenBatch
from support.loaded import SEQUENCES, batch_of, loaded, real

FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox")
TEXTS = ["Once upon a time there was a girl", "The capital of Italy is Rome", "one two"]


def vector(seed=1, site="resid_post.1", norm=3.0):
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(site, drawn, norm)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ("add", "norm_preserving"))
def test_alpha_zero_is_bit_equal_to_no_steering(family, mode):
    model = loaded(family)
    plain = model.run(batch_of(), capture="resid_post.1")
    steered = model.run(batch_of(), edits=[vector().edit(0.0, mode=mode)], capture="resid_post.1")
    rows = model.run(batch_of(), edits=[vector().edit([0.0, 1.0, 0.0], mode=mode)])
    for row in range(3):
        assert torch.equal(
            real(steered.logits, batch_of(), row), real(plain.logits, batch_of(), row)
        )
        same = torch.equal(real(rows.logits, batch_of(), row), real(plain.logits, batch_of(), row))
        assert same == (row != 1)
    made = model.generate(
        batch_of(), edits=[vector().edit(0.0, mode=mode)], max_new_tokens=5, keep_logits=True
    )
    assert torch.equal(
        made.logits, model.generate(batch_of(), max_new_tokens=5, keep_logits=True).logits
    )


def test_the_length_is_kept_and_the_direction_gained():
    model = loaded("llama")
    before = model.run(batch_of(0), capture="resid_post.1")["resid_post.1"]
    edit = vector().edit(2.0, mode="norm_preserving")
    after = model.run(batch_of(0), edits=[edit], capture="resid_post.1")["resid_post.1"]
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-6, atol=0)
    assert bool((after @ vector().unit > before @ vector().unit).all())
    by_hand = before + 6.0 * vector().unit
    by_hand = by_hand * before.norm(dim=-1, keepdim=True) / by_hand.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(after, by_hand, rtol=1e-5, atol=1e-5)
    assert edit.describe()["edit"] == "AddKeepingNorm"


def test_clamp_and_project_set_the_coordinate():
    model, unit = loaded("gpt2"), vector().unit
    for mode, alpha, level in (("clamp", 0.5, 1.5), ("project", None, 0.0)):
        edit = vector().edit(alpha, mode=mode)
        after = model.run(batch_of(0), edits=[edit], capture="resid_post.1")["resid_post.1"]
        torch.testing.assert_close(after @ unit, torch.full((1, 9), level), rtol=1e-4, atol=1e-4)


def test_strengths_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="give a strength"):
        vector().edit()
    with pytest.raises(ConfigError, match="leave out the strength"):
        vector().edit(1.0, mode="project")
    with pytest.raises(ConfigError, match=r"calibrate\(\) it"):
        vector(norm=None).edit(1.0)
    with pytest.raises(ConfigError, match="did you mean 'clamp'"):
        vector().edit(1.0, mode="clmp")
    with pytest.raises(EditError, match="is zero"):
        SteeringVector("resid_post.0", torch.zeros(4))


def cached_equals_uncached(model, prompt, made, edits_of):
    """Compare every step with a whole pass over what was there, edited by hand."""
    ids = list(prompt)
    for step, token in enumerate(made.ids[0]):
        result = model.run(TokenBatch.from_ids([ids]), edits=edits_of(len(ids)), logits="last")
        torch.testing.assert_close(made.logits[0, step], result.logits[0, 0], rtol=3e-5, atol=3e-5)
        ids.append(token)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", (False, True))
def test_a_schedule_gives_each_generated_token_its_own_strength(family, keep):
    model, prompt = loaded(family), SEQUENCES[1]
    base = Add("resid_post.1", vector().vector)
    edit = AddKeepingNorm.of("resid_post.1", vector().vector) if keep else base
    strengths, in_prompt = (2.0, 2.0, 0.0, -1.0), 0.5
    made = model.generate(
        TokenBatch.from_ids([prompt]),
        edits=scheduled(edit, strengths, prompt=in_prompt),
        max_new_tokens=7,
        eos=False,
        keep_logits=True,
    )
    assert len(scheduled(edit, strengths, prompt=in_prompt)) == 3  # equal neighbours share one

    def edits_of(length):
        each = [in_prompt] * len(prompt)
        each += [strengths[min(step, 3)] for step in range(length - len(prompt))]
        kind = AddKeepingNorm.of if keep else Add
        return [
            kind("resid_post.1", vector().vector, factor, positions=at)
            for at, factor in enumerate(each)
            if factor
        ]

    cached_equals_uncached(model, prompt, made, edits_of)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ("all", "after_prompt", "last_k:2", "from_position:3"))
def test_several_vectors_of_all_kinds_steer_cached_as_uncached(family, scope):
    """Left padding, a prompt of one token, vectors per row, and two vectors at once."""
    model = loaded(family)
    prompts = [[1], list(SEQUENCES[1]), list(SEQUENCES[0])]
    alphas = [0.5, -1.0, 0.0]

    def edits(where):
        return [
            vector(1).edit(alphas, scope=where),
            vector(2, "resid_post.0").edit(0.7, mode="norm_preserving", scope=where, rows=[0, 1]),
            vector(3, "resid_post.0").edit(0.2, mode="clamp", scope=where, rows=[1]),
        ]

    made = model.generate(
        TokenBatch.from_ids(prompts, padding_side="left"),
        edits=edits(scope),
        max_new_tokens=5,
        eos=False,
        keep_logits=True,
    )
    parsed = Scope.parse(scope)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for step, token in enumerate(made.ids[row]):
            held = parsed.holds(torch.arange(len(ids))[None], torch.tensor([len(prompt)]))[0]
            at = held.nonzero().flatten().tolist()
            by_hand = [
                vector(1).edit(alphas[row], positions=at),
                *(
                    [vector(2, "resid_post.0").edit(0.7, mode="norm_preserving", positions=at)]
                    * (row < 2)
                ),
                *([vector(3, "resid_post.0").edit(0.2, mode="clamp", positions=at)] * (row == 1)),
            ]
            result = model.run(
                TokenBatch.from_ids([ids]), edits=by_hand if at else [], logits="last"
            )
            torch.testing.assert_close(
                made.logits[row, step], result.logits[0, 0], rtol=5e-5, atol=5e-5
            )
            ids.append(token)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_reaches_the_target_within_one_percent(family):
    model = loaded(family)
    calibrated, coefficient = calibrate(model, vector(norm=None), TEXTS, target=0.5)
    values = model.run(TEXTS, capture="resid_post.1")["resid_post.1"]
    batch = model.tokenize(TEXTS)
    norms = torch.cat([real(values, batch, row)[1:].norm(dim=-1) for row in range(3)])  # no BOS
    assert coefficient * float(vector().vector.norm()) == pytest.approx(
        0.5 * float(norms.median()), rel=0.01
    )
    assert calibrated.typical_norm == pytest.approx(typical_norm(model, "resid_post.1", TEXTS))


def test_calibration_to_a_change_of_kl_is_a_short_monotone_search():
    model = loaded("llama")
    curve = calibrate_kl(model, vector(), TEXTS, target_bits=0.3)
    assert curve.bits == pytest.approx(0.3, rel=0.02)
    assert curve.forwards <= 8 and curve.monotone
    batch = model.tokenize(TEXTS)
    plain, steered = (
        model.run(TEXTS, edits=edits).logits.log_softmax(-1)
        for edits in ([], [vector().edit(curve.alpha)])
    )
    kl = torch.cat(
        [
            real((plain.exp() * (plain - steered)).sum(-1, keepdim=True), batch, row)
            for row in range(3)
        ]
    )
    assert curve.bits == pytest.approx(float(kl.mean()) / 0.6931471805599453, rel=1e-3)
    with pytest.raises(ConfigError, match="raise largest"):
        calibrate_kl(model, vector(), TEXTS, target_bits=500.0)


def test_states_are_read_where_they_were_asked_for():
    model = loaded("llama")
    contrasts = [
        Contrast("the park and the girl", "the rain and the city", "Once upon a time in", "and"),
        Contrast("one", "two three four", "One two three", None),
    ]
    plain = [
        model.run(text, capture="resid_post.1")["resid_post.1"][0] for text in contrasts[0].texts
    ]
    last = read_states(model, contrasts, [1], at="last")
    torch.testing.assert_close(last.positive[0, 0], plain[0][-1], rtol=1e-4, atol=1e-4)
    batch = model.tokenize(contrasts[0].texts[1])
    words = [None if s is None else contrasts[0].texts[1][s[0] : s[1]] for s in batch.offsets[0]]
    label = read_states(model, contrasts[:1], [1], at="label")
    ends = [
        i
        for i, word in enumerate(words)
        if word and "d" in word and word.strip() in ("and", "nd", "d")
    ]
    torch.testing.assert_close(label.negative[0, 0], plain[1][ends[-1]], rtol=1e-4, atol=1e-4)
    mean = read_states(model, contrasts, [1], at="mean")
    before = len(model.tokenize(contrasts[0].prompt).row_ids(0))
    torch.testing.assert_close(mean.positive[0, 0], plain[0][before:].mean(0), rtol=1e-4, atol=1e-4)


def test_a_vector_is_kept_with_its_model_and_refused_by_others(tmp_path):
    model = loaded("llama")
    kept = SteeringVector("resid_post.1", vector().vector, 3.0, "probe", {"contrasts": 12})
    save_vector(kept, tmp_path / "v", model)
    found = load_vector(tmp_path / "v", model)
    assert torch.equal(found.vector, kept.vector)
    assert (found.site, found.typical_norm, found.method, dict(found.details)) == (
        "resid_post.1", 3.0, "probe", {"contrasts": 12},
    )  # fmt: skip
    with pytest.raises(ModelError, match="made for another model"):
        load_vector(tmp_path / "v", loaded("gpt2"))
    with pytest.raises(ModelError, match=r"not at resid_post\.2"):
        load_vector(tmp_path / "v", model, site="resid_post.2")
    text = (tmp_path / "v" / "vector.json").read_text("utf-8")
    data = json.loads(text)
    data["model"]["d_model"] = 64
    (tmp_path / "v" / "vector.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ModelError, match=r"width of the residual stream differs \(64, here 32\)"):
        load_vector(tmp_path / "v", model)
    (tmp_path / "v" / "vector.json").write_text(text, "utf-8")
    (tmp_path / "v" / "vector.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is not the file"):
        load_vector(tmp_path / "v", model)
    with pytest.raises(ModelError, match="no readable steering vector"):
        load_vector(tmp_path / "none", model)
