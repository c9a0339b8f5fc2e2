"""One set of weights in every backend writes the same text under the same steering."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.models import Add, LanguageModel, Scale
from support.loaded import SEQUENCES, loaded
from support.mlx_models import FOUR, in_hugging_face, in_mlx
from support.shared import shared_path

PROMPTS = [SEQUENCES[0], SEQUENCES[2]]


def written(model: LanguageModel, prompts, site: str, strength: float) -> tuple[list, list]:
    """Return the ids, and the log-probabilities of them, of 24 steered greedy tokens."""
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(5))
    edits = [
        Add(site, vector, coefficient=strength),
        Scale("attn.1.head.2.z", 0.5, rows=0),
    ]
    found = model.generate(prompts, max_new_tokens=24, edits=edits, eos=False)
    return [list(ids) for ids in found.ids], [list(values) for values in found.logprobs]


def in_transformer_lens(family: str) -> LanguageModel:
    from support.lens_objects import BRIDGE, lens

    return lens(BRIDGE, family)


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize(
    ("ours", "other"),
    ((in_hugging_face, in_mlx), (loaded, in_transformer_lens)),
    ids=("mlx", "transformer_lens"),
)
def test_steered_greedy_text_is_the_same_in_every_backend(family, ours, other):
    ids, logprobs = written(ours(family), PROMPTS, "resid_post.1", 0.7)
    _, plain = written(ours(family), PROMPTS, "resid_post.1", 0.0)
    theirs, their_logprobs = written(other(family), PROMPTS, "resid_post.1", 0.7)
    assert theirs == ids and logprobs != plain
    torch.testing.assert_close(
        torch.tensor(their_logprobs), torch.tensor(logprobs), rtol=0, atol=1e-3
    )


@pytest.mark.real_model
def test_steered_text_of_a_trained_model_is_the_same():
    path = shared_path("models", "stories260K")
    prompt = "Once upon a time, Lily and Tom went to the park. They saw a big dog and"
    ids, _ = written(layerscope.load(path), prompt, "resid_post.2", 2.0)
    for backend in ("mlx", "transformer_lens"):
        theirs, _ = written(layerscope.load(path, backend=backend), prompt, "resid_post.2", 2.0)
        assert theirs == ids, backend
