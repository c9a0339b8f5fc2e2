"""Path patching: the planted induction head is reached through its keys alone; edges add up."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import SiteError
from layerscope.interventions.patching.paths import (
    Edge,
    Receiver,
    Sender,
    edges_of,
    reaches,
    record_for_paths,
    run_paths,
    said_by,
    senders_of,
)
from layerscope.models import Apply, Capture, Site
from support.loaded import loaded
from support.toy_induction import induction_toy

CLEAN = (1, 17, 40, 5, 300, 251, 8)
CORRUPT = (1, 17, 180, 7, 12, 44, 3)
FAMILIES = ("llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "qwen2", "phi", "mistral")


def logits_of(model):
    return lambda final, rows: final.double() @ model.unembedding.weight.detach().double().T


@pytest.mark.parametrize("beta", (3.0, 8.0, 20.0, 60.0))
def test_the_induction_head_hears_the_previous_token_head_through_its_keys_alone(beta):
    toy = induction_toy(beta, n_prompts=4)
    model = toy.model
    sender = Sender("head", 0, 0)
    receivers = [Receiver(kind, 1, 0) for kind in ("k", "q", "v")]
    expected = toy.exact_effect()
    for prompt in range(4):
        runs = record_for_paths(
            model, torch.stack([toy.clean[prompt], toy.corrupt[prompt]]), [sender]
        )
        # Head 0.0 of the corrupt run, in the clean one.
        logits = run_paths(
            runs,
            edges_of(model, [sender], receivers),
            logits_of(model),
            base_row=0,
            donor_row=1,
        )
        plain = logits_of(model)(runs.final, range(2))[:1]
        target = int(toy.targets[prompt])

        def margin(rows, target=target):
            others = rows.sum(-1) - rows[:, target]
            return rows[:, target] - others / (rows.shape[-1] - 1)

        keys, queries, values = (margin(logits) - margin(plain)).tolist()
        assert keys == pytest.approx(float(expected[prompt]), abs=1e-9)
        assert abs(queries) < 1e-9
        assert abs(values) < 1e-9
    if beta >= 20:  # saturated: the published figure
        assert float(expected.mean()) == pytest.approx(-7.481, abs=1e-3)


def frozen_pass(runs, edge):
    """Run the base row with every sender but one frozen, and let one receiver hear the change."""
    model, receiver = runs.model, edge.receiver
    shift = said_by(runs, edge.sender, 1, 0)
    ids = runs.batch.ids[1:2]
    heard = {}
    if receiver.input == "logits":
        site = Site("resid_post", model.n_layers - 1)
        edit = Apply(site, lambda values, _: values + shift)
        result = model.run(ids, edits=[edit], capture=Capture("final_norm", positions=-1))
        return result["final_norm"][0, -1]
    kind = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "mlp": "mlp_out"}[receiver.input]
    site = Site(kind, receiver.layer)
    mid = Site("resid_mid", receiver.layer)
    through = Site("resid_pre", receiver.layer)
    if receiver.input == "mlp" and model.backend.why_not(mid) is None:
        through = mid
    # What the receiver would give: the base stream, with the shift, at its own input.
    result = model.run(ids, edits=[Apply(through, lambda values, _: values + shift)], capture=site)
    heard = result[site]

    def put(values, _context):
        if receiver.head is None:
            return heard
        values[:, :, receiver.head] = heard[:, :, receiver.head]
        return values

    result = model.run(ids, edits=[Apply(site, put)], capture=Capture("final_norm", positions=-1))
    return result["final_norm"][0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_equals_its_own_two_passes(family):
    model = loaded(family)
    senders = senders_of(model)
    kinds = ("q", "k", "v")
    receivers = [Receiver("logits"), Receiver("mlp", 1), Receiver("mlp", 2)]
    receivers += [Receiver(kind, layer, 1) for kind in kinds for layer in (1, 2)]
    receivers.append(Receiver("q", 2))
    edges = edges_of(model, senders, receivers)
    assert len(edges) > 40
    runs = record_for_paths(model, torch.tensor([CLEAN, CORRUPT]), senders)
    done = []
    fast = run_paths(runs, edges, logits_of(model), base_row=1, donor_row=0, progress=done.append)
    assert sum(done) == len(edges)
    chosen = range(0, len(edges), 5)
    slow = torch.stack([frozen_pass(runs, edges[at]) for at in chosen])
    slow = logits_of(model)(slow, ())
    scale = float(slow.abs().max())
    assert float((fast[list(chosen)] - slow).abs().max()) <= 1e-5 * scale
    plain = logits_of(model)(runs.final, ())[1]
    assert float((fast - plain).abs().max()) > 1e-2 * scale


def test_all_direct_paths_to_the_logits_are_the_whole_difference_without_norms():
    toy = induction_toy(3.0, n_prompts=1)
    model = toy.model
    senders = senders_of(model)
    runs = record_for_paths(model, torch.stack([toy.clean[0], toy.corrupt[0]]), senders)
    edges = edges_of(model, senders, [Receiver("logits")])
    values = run_paths(runs, edges, logits_of(model), base_row=0, donor_row=1)
    ends = logits_of(model)(runs.final, ())
    torch.testing.assert_close((values - ends[0]).sum(0), ends[1] - ends[0])


def test_positions_limit_what_a_sender_says():
    toy = induction_toy(8.0, n_prompts=1)
    sender, receiver = Sender("head", 0, 0), Receiver("k", 1, 0)
    runs = record_for_paths(toy.model, torch.stack([toy.clean[0], toy.corrupt[0]]), [sender])
    place = int(toy.places[0]) + 1
    values = [
        run_paths(
            runs,
            [Edge(sender, receiver)],
            logits_of(toy.model),
            base_row=0,
            donor_row=1,
            positions=positions,
        )
        for positions in (None, [place], [place + 1])
    ]
    plain = logits_of(toy.model)(runs.final, ())[:1]
    # Elsewhere head 0.0 says the same up to the attention it leaks, a thousandth here.
    whole = float((values[0] - plain).abs().max())
    assert float((values[1] - values[0]).abs().max()) < 1e-3 * whole
    assert 0 < float((values[2] - plain).abs().max()) < 1e-3 * whole


def test_what_leads_downwards_is_refused():
    model = loaded("llama")
    sender, receiver = Sender("mlp", 1), Receiver("q", 1, 0)
    assert not reaches(model, sender, receiver)
    assert reaches(model, Sender("head", 1, 0), Receiver("mlp", 1))
    assert not reaches(loaded("gpt_neox"), Sender("head", 1, 0), Receiver("mlp", 1))
    runs = record_for_paths(model, torch.tensor([CLEAN, CORRUPT]), [sender])
    with pytest.raises(SiteError, match=r"mlp\.1 writes after 1\.0\.q has read"):
        run_paths(runs, [Edge(sender, receiver)], logits_of(model), base_row=1, donor_row=0)
