"""The rules behind the guidance; each returns the reasons that the evidence supports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from layerscope.measures.config import decimal
from layerscope.measures.evidence import Evidence, Reason
from layerscope.measures.health import health_caution
from layerscope.measures.raw_norm import median_score
from layerscope.measures.tokens import is_blank

Rule = Callable[[Evidence], Iterator[Reason]]


def _of(count: int, total: int) -> str:
    return f"{count} of {total} facts" if total != 1 else "the one fact"


def numeric(evidence: Evidence) -> Iterator[Reason]:
    """NaN or infinity in the rows that milestones rest on."""
    health = evidence.sections["numeric_health"]
    if not health["any_nonfinite"]:
        return
    first = evidence.facts[0]
    early = health_caution(
        health,
        copy=first.milestones["L_copy"].first,
        semantic=first.milestones["L_semantic"].first,
    )
    flagged: list[int] = health["layers_flagged"]
    yield Reason(
        "numeric_health_caution",
        "high" if early else "medium",
        f"NaN or infinity appeared in {len(flagged)} layer{'s' * (len(flagged) > 1)}, first at "
        f"layer {flagged[0]}.",
        {"layers_flagged": flagged, "before_milestones": early},
        "Run again with --dtype float32, or bfloat16 instead of float16.",
    )


def last_row(evidence: Evidence) -> Iterator[Reason]:
    """The lens's last row is not the model's own head."""
    rows: list[dict[str, Any]] = evidence.sections["last_layer_consistency"]
    known = [row["kl_to_final_bits"] for row in rows if row["kl_to_final_bits"] is not None]
    warned = [row for row in rows if row["warn_high_last_layer_kl"]]
    if warned:
        yield Reason(
            "warn_high_last_layer_kl",
            "high",
            f"At the last layer, where the lens must equal the model, it is {max(known):.2f} bits "
            f"away in {len(warned)} of {len(rows)} prompts.",
            {
                "max_kl_bits": max(known),
                "prompts": len(warned),
                "threshold_bits": evidence.config.last_row_kl_bits,
            },
            "Read ranks only, and check that every transform of the head (bias, scale, softcap) is "
            "applied: layerscope check MODEL.",
        )
    elif known and max(known) > evidence.config.last_row_exact_bits:
        yield Reason(
            "last_row_inexact",
            "low",
            f"At the last layer the lens differs from the model by up to {max(known):.3f} bits.",
            {"max_kl_bits": max(known), "expected_bits": evidence.config.last_row_exact_bits},
            "Rounding of a low-precision head explains less than 0.001 bits; try --dtype float32.",
        )


def alignment(evidence: Evidence) -> Iterator[Reason]:
    """Some answers could not be found in the tokens that follow their prompt."""
    gold = evidence.sections["gold_alignment"]
    if not gold["partial"]:
        return
    rate: float = gold["rate"]
    yield Reason(
        "gold_alignment_partial",
        "medium" if rate >= 0.8 else "high",
        f"{len(gold['partial'])} of {gold['n']} prompts have an answer that could not be aligned "
        "with the tokens; their ranks are unknown.",
        {"rate": rate, "statuses": sorted({entry["status"] for entry in gold["partial"]})},
        "Correct those answers (spelling, leading space) or leave the prompts out.",
    )


def blank_answers(evidence: Evidence) -> Iterator[Reason]:
    """The first token of an answer is only a space, so its rank is not the answer's."""
    blank = [
        prompt
        for prompt in evidence.meta.prompts
        if len(prompt.answer_pieces) > 1 and is_blank(prompt.answer_pieces[0])
    ]
    if blank:
        indices = {prompt.prompt_index for prompt in blank}
        facts = sum(fact.part.prompt.prompt_index in indices for fact in evidence.facts)
        yield Reason(
            "answer_blank_first",
            "high" if 2 * facts >= evidence.n else "medium",
            f"In {len(blank)} of {len(evidence.meta.prompts)} prompts the answer's first token is "
            "only white space: its rank says nothing of the answer.",
            {
                "prompts": len(blank),
                "facts": facts,
                "answers": sorted({prompt.answer or "" for prompt in blank})[:8],
            },
            "Read answer_full_log2p, or choose answers that begin with a letter-bearing token.",
        )


def wrong_answers(evidence: Evidence) -> Iterator[Reason]:
    """The model itself does not answer as expected, so there is no onset to find."""
    wrong: dict[str, int] = {}
    for fact in evidence.facts:
        head = fact.part.prompt.head
        rank = head.answer_rank if head is not None else None
        if rank is None:
            at = fact.part.at("answer_rank", fact.part.n_layers)
            rank = None if at is None else int(at)
        if rank is not None and rank > 1:
            wrong[fact.part.prompt.fact_key or str(fact.part.prompt.prompt_index)] = rank
    if wrong:
        half = 2 * len(wrong) >= evidence.n
        yield Reason(
            "answer_not_final_top1",
            "high" if half else "medium",
            f"The model's own first choice is another token in {_of(len(wrong), evidence.n)}: for "
            "these, a layer at which the answer appears is not what the model goes on to say.",
            {"final_answer_rank": dict(sorted(wrong.items())[:8]), "facts": len(wrong)},
            "Leave these facts out, or reword the prompt until the model answers.",
        )


def confirmation(evidence: Evidence) -> Iterator[Reason]:
    """No second lens sees the answer where the norm lens first does."""
    confirmed: dict[str, dict[str, Any]] = evidence.sections["confirmed_semantics"]
    tested = [
        entry
        for entry in confirmed.values()
        if entry["L_semantic_norm"] is not None and entry["lenses_available"]
    ]
    missed = [entry for entry in tested if entry["confirmed_source"] == "none"]
    if missed:
        yield Reason(
            "semantics_unconfirmed",
            "high" if len(missed) == len(tested) else "medium",
            f"In {_of(len(missed), len(tested))} no other lens has the answer on top within "
            f"{evidence.config.confirm_window} layers of where the norm lens first does.",
            {
                "unconfirmed": len(missed),
                "tested": len(tested),
                "lenses": tested[0]["lenses_available"],
                "layers": [entry["L_semantic_norm"] for entry in missed[:8]],
            },
            "Quote the layer as 'under the norm lens'; fit a tuned lens for an independent view.",
        )
    if confirmed and not any(entry["lenses_available"] for entry in confirmed.values()):
        yield Reason(
            "no_second_lens",
            "medium",
            "Only one lens was run, so nothing checks what the normalisation adds.",
            {"lenses": evidence.sections["lenses"]},
            "Run with --lens raw,norm.",
        )


def norm_only(evidence: Evidence) -> Iterator[Reason]:
    """The onset row itself is right under norm and wrong under raw."""
    full: dict[str, dict[str, Any]] = evidence.sections["raw_lens_full"]
    confirmed = evidence.sections["confirmed_semantics"]
    hit = [
        key
        for key, check in full.items()
        if confirmed[key]["L_semantic_norm"] in check["norm_only_semantics_layers"]
        and confirmed[key]["confirmed_source"] != "none"
    ]
    if hit:
        yield Reason(
            "norm_only_semantics_window",
            "low",
            f"In {_of(len(hit), len(full))} the onset layer itself is right only after "
            "normalisation; without it the answer leads a layer or two off.",
            {"facts": hit[:8], "n_facts": len(hit)},
            "Quote the onset with the window of layers that confirms it.",
        )


def artefact(evidence: Evidence) -> Iterator[Reason]:
    """Raw and norm lens disagree over a large part of the depth."""
    checks = list(evidence.sections["raw_lens_full"].values())
    score = median_score(checks)
    if score is None or score <= evidence.config.score_tiers[1]:
        return
    high = evidence.config.raw_kl_high_bits
    shares = [check[f"pct_layers_kl_ge_{decimal(high)}"] for check in checks]
    yield Reason(
        "high_lens_artifact_score",
        "medium",
        f"With and without normalisation the layers read differently: by {high:g} "
        f"bit{'' if high == 1 else 's'} or more on {max(shares):.0%} of the layers in the worst "
        "fact.",
        {"median_score": score, "tier_above": evidence.config.score_tiers[1], "shares": shares[:8]},
        "Compare ranks, not probabilities, across layers and models.",
    )


def near_uniform(evidence: Evidence) -> Iterator[Reason]:
    """The answer leads, but with next to no probability."""
    weak = [
        fact
        for fact in evidence.facts
        if fact.fields["semantic_margin"]["margin_ok_at_L_semantic_norm"] is False
    ]
    if weak:
        margin = weak[0].fields["semantic_margin"]
        p: float = margin["p_answer_at_L_semantic_norm"]
        yield Reason(
            "rank_only_near_uniform",
            "medium" if 2 * len(weak) >= evidence.n else "low",
            f"In {_of(len(weak), evidence.n)} the answer is first by rank while its probability is "
            f"hardly above chance ({p:.2g} at first).",
            {
                "facts": len(weak),
                "p_answer": p,
                "p_uniform": margin["p_uniform"],
                "L_semantic": [fact.milestones["L_semantic"].first for fact in weak[:8]],
                "L_semantic_margin_ok": [
                    fact.milestones["L_semantic_margin_ok"].first for fact in weak[:8]
                ],
            },
            "Report L_semantic_margin_ok next to L_semantic.",
        )


def lost(evidence: Evidence) -> Iterator[Reason]:
    """The answer comes first, then falls back, then returns."""
    gone = [
        fact
        for fact in evidence.facts
        # A row of NaN hides the answer; that is not the answer falling back.
        if set(fact.milestones["L_semantic"].lost)
        - set(fact.part.layers[fact.part.true("nonfinite")].tolist())
    ]
    if gone:
        yield Reason(
            "semantics_not_stable",
            "medium" if 2 * len(gone) >= evidence.n else "low",
            f"In {_of(len(gone), evidence.n)} the answer reaches first place and loses it again.",
            {
                "facts": len(gone),
                "first": [fact.milestones["L_semantic"].first for fact in gone[:8]],
                "stable": [fact.milestones["L_semantic"].stable for fact in gone[:8]],
            },
            "Quote the first layer from which it stays (stable) beside the first one.",
        )


def control(evidence: Evidence) -> Iterator[Reason]:
    """The control prompt does not get its own answer."""
    summary = evidence.sections["control_summary"]
    if summary is None:
        yield Reason(
            "no_control",
            "low",
            "There is no control prompt: an answer that comes up whatever is asked looks just like "
            "this.",
            {},
            "Give each fact a control prompt and a foil.",
        )
        return
    failed = [
        entry
        for entry in summary["controls"]
        if entry["control_margin_last_row"] is not None and entry["control_margin_stable"] is None
    ]
    if failed:
        total = len(summary["controls"])
        yield Reason(
            "control_not_separated",
            "high" if 2 * len(failed) >= total else "medium",
            f"In {len(failed)} of {total} control prompts the right answer does not end up ahead "
            "of the wrong one: the reading may not depend on what is asked.",
            {
                "delta": evidence.config.control_margin,
                "last_row_margin": [entry["control_margin_last_row"] for entry in failed[:8]],
            },
            "Check control prompt and foil; do not read the onset as knowledge of this fact.",
        )


def wording(evidence: Evidence) -> Iterator[Reason]:
    """Leaving out one word moves the onset."""
    tolerance = max(2, math.ceil(0.1 * evidence.meta.n_layers))
    moved: dict[str, list[int | None]] = {}
    for key, entry in evidence.sections["ablation_summary"].items():
        before, after, delta = entry["L_sem_orig"], entry["L_sem_nf"], entry["delta_L_sem"]
        if (before is None) != (after is None) or (delta is not None and abs(delta) >= tolerance):
            moved[key] = [before, after]
    if moved:
        total = len(evidence.sections["ablation_summary"])
        yield Reason(
            "wording_sensitive",
            "medium" if 2 * len(moved) >= total else "low",
            f"In {_of(len(moved), total)} leaving out one word moves the onset by {tolerance} "
            "layers or more, or removes it.",
            {"with_and_without": dict(list(moved.items())[:8]), "tolerance": tolerance},
            "Report the onset over several wordings.",
        )


def spread(evidence: Evidence) -> Iterator[Reason]:
    """Facts disagree widely, or there are too few to tell."""
    low, high = evidence.sections["micro_suite"]["aggregates"]["L_semantic_norm_iqr"]
    if evidence.n < 3:
        yield Reason(
            "few_facts",
            "low",
            f"The run has {evidence.n} fact{'s' if evidence.n != 1 else ''}; a single prompt is an "
            "anecdote.",
            {"facts": evidence.n},
            "Run at least five facts of the same kind.",
        )
    elif low is not None and high - low > 0.25 * evidence.meta.n_layers:
        yield Reason(
            "onset_varies",
            "low",
            f"The middle half of the facts has its onset anywhere between layers {low} and {high}.",
            {"iqr": [low, high], "n_layers": evidence.meta.n_layers},
            "Report the median with this range, not one layer.",
        )


def echo(evidence: Evidence) -> Iterator[Reason]:
    """Early layers repeat the prompt with confidence."""
    layers = [layer for layer in evidence.layers("L_copy") if layer is not None]
    if layers:
        yield Reason(
            "prompt_echo",
            "low",
            f"In {_of(len(layers), evidence.n)} some layers repeat a prompt token with near "
            f"certainty (first at layer {min(layers)}).",
            {"facts": len(layers), "L_copy": layers[:8]},
            "Do not read confidence at those layers as a prediction.",
        )


def trajectory(evidence: Evidence) -> Iterator[Reason]:
    """The residual's length jumps between two layers."""
    found = evidence.sections["norm_trajectory"]["growth_spikes"]
    if found:
        yield Reason(
            "normalization_spike",
            "low",
            f"The residual's length jumps at layer {found[0]}, far beyond its usual growth.",
            {"layers": found[:8], "growth_factor": evidence.config.growth_factor},
            "Treat readings right at those layers with care.",
        )


def norm_choice(evidence: Evidence) -> Iterator[Reason]:
    """Rows were decoded with the next block's norm instead of the final one."""
    if evidence.meta.norm_choice != "next_norm":
        return
    yield Reason(
        "norm_choice_next_norm",
        "low",
        "Layers were decoded with the next block's input norm, whose gains serve attention: "
        "probabilities in the middle of the stack come out too flat.",
        {"norm_choice": evidence.meta.norm_choice},
        "Use --norm final for interpretation; keep next_norm for comparison with earlier runs.",
    )


RULES: tuple[Rule, ...] = (
    numeric,
    last_row,
    blank_answers,
    wrong_answers,
    control,
    alignment,
    confirmation,
    artefact,
    near_uniform,
    lost,
    wording,
    norm_only,
    spread,
    echo,
    trajectory,
    norm_choice,
)
