"""Tasks and their prompts; the resumed path against whole passes, family by family."""

from __future__ import annotations

import json

import pytest
import torch

from layerscope.errors import PromptError
from layerscope.interventions.function_vectors.effects import (
    bootstrap_mean,
    indirect_effects,
    mean_heads,
    probabilities,
    top_heads,
)
from layerscope.interventions.function_vectors.suffix import LastToken
from layerscope.interventions.function_vectors.tasks import Layout, Task, make_trials, read_task
from layerscope.interventions.function_vectors.vector import (
    finish_with_heads,
    finish_with_vectors,
    function_vector,
    head_writes,
)
from layerscope.models import Add, Replace
from support.loaded import loaded
from support.shared import shared_path

PROMPTS = ["one two three four", "The capital of Italy is", "Once", "city girl park one six ten"]
TARGETS = [5, 60, 7, 90]


def test_tasks_are_read_in_every_shape(tmp_path):
    pairs = (("up", "down"), ("in", "out"))
    shapes = {
        "a.json": '[{"input": "up", "output": "down"}, {"input": "in", "output": "out"}]',
        "b.json": '{"name": "opposites", "samples": [{"subject": "up", "object": "down"}, '
        '{"subject": "in", "object": "out"}, {"subject": "in", "object": "away"}]}',
        "c.yaml": "pairs: [[up, down], [in, out]]\ntest: [in]\n",
        "d.csv": "input,output\nup,down\nin,out\n",
    }
    for name, text in shapes.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_task(tmp_path / name).pairs == pairs
    assert read_task(tmp_path / "b.json").name == "opposites"
    assert read_task(tmp_path / "c.yaml").test == ("in",)
    (tmp_path / "e.json").write_text(json.dumps([{"input": "up"}]), encoding="utf-8")
    with pytest.raises(PromptError, match="row 1: give 'input' and 'output'"):
        read_task(tmp_path / "e.json")


def test_published_tasks_are_read():
    folder = shared_path("data", "function_vectors")
    for path in sorted(folder.glob("*.json")):
        assert len(read_task(path).pairs) > 20, path.name
    relation = read_task(shared_path("data", "lre_relations", "linguistic", "adj_antonym.json"))
    assert len(relation.pairs) > 20


def test_prompts_show_permute_and_hide_the_task():
    task = Task("next", (("one", "two"), ("two", "three"), ("six", "ten"), ("park", "city")))
    trials = make_trials(
        loaded("llama"), task.pairs, task.pairs, shots=3, count=6, layout=Layout(), seed=4
    )
    answers = dict(task.pairs)
    for trial in trials:
        *shots, last = trial.clean.split("\n\n")
        assert last == f"Q: {trial.query}\nA:" == trial.zero_shot
        assert trial.query not in {shot.split("\n")[0][3:] for shot in shots}
        shown = [tuple(part[3:] for part in shot.split("\n")) for shot in shots]
        assert all(answers[x] == y for x, y in shown)
        mixed = [tuple(p[3:] for p in s.split("\n")) for s in trial.shuffled.split("\n\n")[:-1]]
        assert [x for x, _ in mixed] == [x for x, _ in shown]
        assert sorted(y for _, y in mixed) == sorted(y for _, y in shown)
        assert all(answers[x] != y for x, y in mixed)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "gpt_neox", "mistral", "olmo2"))
@pytest.mark.parametrize("budget", (1 << 30, 1))
def test_the_resumed_path_equals_whole_passes(family, budget):
    """Prompts of several lengths, one a single token in some tokenizers; also one row at a time."""
    model = loaded(family)
    read = LastToken(model, PROMPTS, budget=budget)
    means = mean_heads(model, PROMPTS, TARGETS, only_answered=False).heads
    plain = model.run(PROMPTS, logits="last").logits[:, -1]
    targets = plain.argmax(-1)  # likely ones, so that there is an effect to compare
    torch.testing.assert_close(read.logits, plain, rtol=1e-5, atol=1e-5)
    for layer in range(model.n_layers):
        effects = indirect_effects(read, means, layer, targets.tolist())
        for head in range(model.n_heads):
            edit = Replace(f"attn.{layer}.head.{head}.z", value=means[layer][head], positions=-1)
            edited = model.run(PROMPTS, edits=[edit], logits="last").logits[:, -1]
            naive = probabilities(edited, targets) - probabilities(plain, targets)
            torch.testing.assert_close(effects[head], naive, rtol=0, atol=1e-5)
        assert float(effects.abs().max()) > 5e-5  # gemma2's capped logits move little
    writes = head_writes(model, means)
    heads = ((0, 1), (1, 0), (model.n_layers - 1, 1))
    vector = function_vector(writes, heads)
    for layer in range(model.n_layers):
        ours = finish_with_vectors(read, torch.stack([vector, -vector]), layer, coefficient=2.0)
        for sign, of_vector in zip((2.0, -2.0), ours, strict=True):
            add = Add(f"resid_post.{layer}", vector, sign, positions=-1)
            naive = model.run(PROMPTS, edits=[add], logits="last").logits[:, -1]
            torch.testing.assert_close(of_vector, naive, rtol=1e-5, atol=2e-5)
    edits = [
        Replace(f"attn.{layer}.head.{head}.z", value=means[layer][head], positions=-1)
        for layer, head in heads
    ]
    naive = model.run(PROMPTS, edits=edits, logits="last").logits[:, -1]
    torch.testing.assert_close(finish_with_heads(read, means, heads), naive, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_what_heads_write_is_their_mean_times_their_share_of_the_projection(family):
    model = loaded(family)
    means = mean_heads(model, PROMPTS, TARGETS, only_answered=False).heads
    result = model.run(PROMPTS, capture=["attn.1.head.*.out"], logits=None)
    writes = head_writes(model, means)
    for head in range(model.n_heads):
        out = result[f"attn.1.head.{head}.out"]
        last = torch.stack([out[row, end - 1] for row, end in enumerate(result.batch.lengths)])
        torch.testing.assert_close(writes[1, head], last.mean(0), rtol=1e-4, atol=1e-5)


def test_the_interval_holds_the_mean_and_shrinks():
    draw = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().numpy() + 1.0
    low, high = bootstrap_mean(draw[None])
    assert low[0] < draw.mean() < high[0]
    assert float(high[0] - low[0]) == pytest.approx(2 * 1.96 * draw.std() / 20, rel=0.1)


def test_ties_go_to_the_first_head():
    assert top_heads({(1, 0): 0.5, (0, 2): 0.5, (0, 1): 0.7, (2, 2): 0.1}, 3) == (
        (0, 1), (0, 2), (1, 0),
    )  # fmt: skip
