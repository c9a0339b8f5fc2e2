"""Parts of a logit sum to the logit, in every family, and each is what it claims to be."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import CapabilityError, ConfigError
from layerscope.interventions.direct import (
    direct_logit_attribution,
    neuron_attribution,
    source_attribution,
)
from layerscope.interventions.stream import freeze_norm, writers, writings
from layerscope.models import Site, ZeroAblate
from support.loaded import EVERY, batch_of, hf, loaded
from support.tiny_models import tiny, tiny_tokenizer
from support.toy_induction import induction_toy

ANSWERS, FOILS = [5, 6, 7], [8, 9, 10]
NEURONS = ("llama", "gpt2", "qwen2", "phi", "gpt_neox", "gemma", "granite", "opt")
PATTERNS = ("llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "granite", "mixtral", "cohere")


def logits_of(model, batch, position):
    logits = model.run(batch, logits=[[position]] * len(batch)).logits[:, 0].double()
    return logits.gather(1, torch.tensor(ANSWERS)[:, None])[:, 0], logits


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("position", (-1, 2))
def test_parts_sum_to_the_logit(family: str, position: int) -> None:
    model, batch = loaded(family), batch_of()
    expected, logits = logits_of(model, batch, position)
    alone = direct_logit_attribution(model, batch, ANSWERS, position=position)
    torch.testing.assert_close(alone.logit, expected, rtol=1e-6, atol=1e-6)
    pair = direct_logit_attribution(model, batch, ANSWERS, FOILS, position=position, heads=False)
    foil = logits.gather(1, torch.tensor(FOILS)[:, None])[:, 0]
    torch.testing.assert_close(pair.logit, expected - foil, rtol=1e-5, atol=1e-5)
    for found in (alone, pair):
        assert found.relative_remainder < 2e-6
        assert float(torch.stack(list(found.parts.values())).abs().max()) > 0.01


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "phi"))
def test_left_padding_changes_nothing(family: str) -> None:
    model = loaded(family)
    right = direct_logit_attribution(model, batch_of(), ANSWERS).parts
    left = direct_logit_attribution(model, batch_of(side="left"), ANSWERS).parts
    for part, values in right.items():
        torch.testing.assert_close(left[part], values, rtol=1e-4, atol=1e-5)


def test_the_softcap_is_a_part_of_its_own() -> None:
    model = loaded("gemma2")
    found = direct_logit_attribution(model, batch_of(), ANSWERS, FOILS)
    assert float(found.parts["softcap"].abs().min()) > 0
    bare = sum(values for part, values in found.parts.items() if part != "softcap")
    cap = model.unembedding.softcap
    alone = direct_logit_attribution(model, batch_of(), ANSWERS)
    uncapped = sum(v for part, v in alone.parts.items() if part != "softcap")
    torch.testing.assert_close(cap * torch.tanh(uncapped / cap), alone.logit, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bare, found.logit, atol=1e-4)


def test_biases_are_parts_of_their_own() -> None:
    found = direct_logit_attribution(loaded("phi"), batch_of(), ANSWERS).parts
    assert float(found["unembed_bias"].abs().max()) > 0.01
    assert float(found["norm_bias"].abs().max()) > 0.01
    assert (
        "unembed_bias" not in direct_logit_attribution(loaded("llama"), batch_of(), ANSWERS).parts
    )


def test_a_part_is_what_its_removal_takes_when_nothing_follows() -> None:
    """In the last block of a model without norms, a head's share is the effect of zeroing it."""
    toy = induction_toy(4.0, n_prompts=5)
    found = direct_logit_attribution(toy.model, toy.clean, toy.targets)
    at = torch.arange(5), toy.targets
    whole = toy.model.run(toy.clean, logits="last").logits[:, 0][at]
    for head in range(4):
        without = toy.model.run(
            toy.clean, edits=[ZeroAblate(f"attn.1.head.{head}.z")], logits="last"
        ).logits[:, 0][at]
        torch.testing.assert_close(found.parts[f"attn.1.head.{head}"], whole - without)
    assert float(found.parts["attn.1.head.0"].min()) > 2
    torch.testing.assert_close(found.parts["attn.1.head.0"], found.logit)


@pytest.mark.parametrize("family", NEURONS)
def test_neurons_sum_to_their_mlp(family: str) -> None:
    model, batch = loaded(family), batch_of()
    whole = direct_logit_attribution(model, batch, ANSWERS, FOILS, heads=False)
    found = neuron_attribution(model, batch, ANSWERS, FOILS)
    down = model.backend.structure.blocks[1].inner.post.module
    for layer in range(model.n_layers):
        shares, bias = found[f"mlp.{layer}"], found[f"mlp.{layer}.bias"]
        torch.testing.assert_close(
            shares.sum(-1) + bias[:, 0], whole.parts[f"mlp.{layer}"], rtol=1e-4, atol=1e-5
        )
        if getattr(down, "bias", None) is None:
            assert float(bias.abs().max()) < 1e-4 * float(shares.abs().max())
    off = model.run(batch, capture=Site("mlp.post", 1), logits=None)[Site("mlp.post", 1)]
    last = torch.stack([off[row, length - 1] for row, length in enumerate(batch.lengths)])
    assert torch.equal(found["mlp.1"] == 0, (last == 0) | (found["mlp.1"] == 0))


def test_neurons_before_a_norm_are_refused() -> None:
    with pytest.raises(CapabilityError, match="not linear in its neurons"):
        neuron_attribution(loaded("gemma2"), batch_of(), ANSWERS)
    with pytest.raises(CapabilityError, match="mixture of experts"):
        neuron_attribution(loaded("mixtral"), batch_of(), ANSWERS)


@pytest.mark.parametrize("family", PATTERNS)
def test_source_positions_sum_to_their_head(family: str) -> None:
    model, batch = loaded(family), batch_of()
    whole = direct_logit_attribution(model, batch, ANSWERS, FOILS)
    found = source_attribution(model, batch, ANSWERS, FOILS)
    for layer in range(model.n_layers):
        shares = found[f"attn.{layer}"]
        for head in range(model.n_heads):
            torch.testing.assert_close(
                shares[:, head].sum(-1),
                whole.parts[f"attn.{layer}.head.{head}"],
                rtol=1e-4,
                atol=1e-5,
            )
        for row, length in enumerate(batch.lengths):
            assert not shares[row, :, length:].any()


def test_the_induction_head_takes_its_logit_from_the_token_after() -> None:
    toy = induction_toy(20.0, n_prompts=6)
    shares = source_attribution(toy.model, toy.clean, toy.targets)["attn.1"][:, 0]
    assert torch.equal(shares.argmax(-1), toy.places + 1)


def test_what_parts_write_sums_to_the_stream() -> None:
    for family in ("llama", "gemma2", "gpt_neox", "granite"):
        model, batch = loaded(family), batch_of(0)
        written = writings(model, batch)
        assert list(written) == writers(model)
        total = sum(written.values())
        residual = model.run(batch, capture=f"resid_post.{model.n_layers - 1}", logits=None)
        torch.testing.assert_close(
            total, residual[f"resid_post.{model.n_layers - 1}"], rtol=1e-4, atol=1e-4
        )


def test_a_norm_that_is_no_norm_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 8, generator=generator)
    with pytest.raises(CapabilityError, match="neither a LayerNorm nor an RMSNorm"):
        freeze_norm(torch.tanh, rows, torch.tanh(rows), torch.float32, "tanh")
    for width in (7, 8):
        norm = torch.nn.LayerNorm(width)
        # The first gain divides the others: it must not be small.
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        torch.nn.init.normal_(norm.bias, generator=generator)
        rows = torch.randn(4, width, generator=generator)
        frozen = freeze_norm(norm, rows, norm(rows), torch.float32)
        assert frozen.centred
        gain = frozen.gain.float() / frozen.gain[0].float()
        torch.testing.assert_close(gain, norm.weight.detach() / norm.weight[0].detach())
        torch.testing.assert_close(frozen.bias.float(), norm.bias.detach())


def test_wrong_answers_are_refused() -> None:
    model = loaded("llama")
    with pytest.raises(ConfigError, match="2 answers for 3 prompts"):
        direct_logit_attribution(model, batch_of(), [1, 2])
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        direct_logit_attribution(model, batch_of(), [1, 2, model.d_vocab])


def test_low_precision_says_so_in_its_remainder() -> None:
    import layerscope

    model = layerscope.load(tiny("llama", dtype=torch.bfloat16), tokenizer=tiny_tokenizer())
    found = direct_logit_attribution(model, batch_of(), ANSWERS)
    assert 1e-6 < found.relative_remainder < 2e-2
    assert hf(model).dtype == torch.bfloat16
