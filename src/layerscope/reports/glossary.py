"""The words of the report: milestones in reading order, and what each term means in plain words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Milestone:
    """One milestone: its name in the summary, a label for a narrow chip, and its meaning."""

    name: str
    label: str
    meaning: str
    lasts: bool = True  # whether one expects it to stay true up to the last layer


MILESTONES: tuple[Milestone, ...] = (
    Milestone("L_semantic", "top-1", "the answer is the top prediction"),
    Milestone("L_semantic_run2", "run of 2", "the answer is top in this layer and the next"),
    Milestone(
        "L_semantic_strong",
        "strong",
        "the answer is top, clearly above chance and clearly ahead of the runner-up",
    ),
    Milestone("L_semantic_strong_run2", "strong ×2", "strong in this layer and the next"),
    Milestone(
        "L_semantic_confirmed",
        "confirmed",
        "another lens also puts the answer on top within two layers",
    ),
    Milestone(
        "L_surface_to_meaning",
        "surface→meaning",
        "the answer has more probability than all tokens of the prompt together, by 0.05",
    ),
    Milestone(
        "L_geom", "geometry", "the state points closer to the answer than to any prompt token"
    ),
    Milestone("first_rank_le_5", "top-5", "the answer is among the five most likely tokens"),
    Milestone("first_rank_le_10", "top-10", "the answer is among the ten most likely tokens"),
    Milestone(
        "first_kl_below_0.5", "KL≤0.5", "the reading is within 0.5 bits of the model's own output"
    ),
    Milestone(
        "first_kl_below_1.0", "KL≤1", "the reading is within 1 bit of the model's own output"
    ),
    Milestone("L_copy", "copy", "the layer confidently repeats a token of the prompt", False),
    Milestone("L_copy_H", "entropy≤1", "the reading has at most 1 bit of uncertainty", False),
    Milestone(
        "L_semantic_margin_ok",
        "above chance",
        "the answer is top and its probability is at least 0.002 above uniform",
    ),
    Milestone("L_semantic_top2_ok", "gap≥0.5", "the answer leads the runner-up by 0.5 logits"),
    Milestone(
        "L_topk_decay", "echo gone", "the 50 most likely tokens hold little of the prompt's own"
    ),
)
# What is marked in figures; the others are listed in tables only, to keep the figures readable.
MARKED: tuple[str, ...] = (
    "L_semantic",
    "L_semantic_run2",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "L_surface_to_meaning",
    "first_rank_le_5",
    "first_kl_below_0.5",
    "L_copy",
)
# Columns of the table of facts.
TABULATED: tuple[str, ...] = (
    "L_copy",
    "first_rank_le_5",
    "L_semantic",
    "L_semantic_run2",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "L_surface_to_meaning",
    "first_kl_below_0.5",
)

# Spellings under which a summary may carry the same milestone.
_ALIASES = {
    "L_semantic_norm": "L_semantic",
    "L_semantic_margin_ok_norm": "L_semantic_margin_ok",
    "L_semantic_top2_ok_norm": "L_semantic_top2_ok",
    "L_surface_to_meaning_norm": "L_surface_to_meaning",
    "L_geom_norm": "L_geom",
    "L_topk_decay_norm": "L_topk_decay",
}
_BY_NAME = {entry.name: entry for entry in MILESTONES}


def canonical(name: str) -> str:
    """Return the report's name of a milestone."""
    return _ALIASES.get(name, name)


def label(name: str) -> str:
    """Return a short label for a chip or a column; unknown milestones keep their name."""
    entry = _BY_NAME.get(canonical(name))
    return entry.label if entry else name


def meaning(name: str) -> str:
    """Return what a milestone means, or an empty string for an unknown one."""
    entry = _BY_NAME.get(canonical(name))
    return entry.meaning if entry else ""


def lasts(name: str) -> bool:
    """Return whether a milestone is expected to stay true up to the last layer."""
    entry = _BY_NAME.get(canonical(name))
    return entry is None or entry.lasts


TERMS: tuple[tuple[str, str], ...] = (
    (
        "layer (row)",
        "Row 0 is the embedding before the first block; row k is the residual stream after block "
        "k. The last row is what the model's own head reads.",
    ),
    (
        "lens",
        "A way to read a layer as if it were the last one: its state is turned into a prediction "
        "of the next token. The norm lens applies the model's normalisation first; the raw lens "
        "does not. Where they disagree, the reading depends on the tool more than on the model.",
    ),
    (
        "entropy",
        "How undecided a prediction is, in bits. 0 is certain; the maximum, log₂ of the vocabulary "
        "size, is a uniform guess.",
    ),
    (
        "KL to final",
        "How many bits the layer's prediction differs from the model's own final prediction. "
        "0 means identical.",
    ),
    (
        "answer rank",
        "1 when the answer's first token is the most likely token, 2 when one token is more "
        "likely, and so on. Ranks can be compared between models; probabilities and bits often "
        "cannot.",
    ),
    (
        "first and stable",
        "A milestone is first true at one layer, and stable from the layer after which it stays "
        "true to the end. “4 → 7” means first at 4, lost again, stable from 7.",
    ),
    (
        "JS, L1, Jaccard",
        "Three distances between the raw and the norm reading: Jensen-Shannon divergence (bits, 0 "
        "to 1), the summed difference of probabilities (0 to 2), and the overlap of the 50 most "
        "likely tokens (1 = the same set).",
    ),
    (
        "artefact tier",
        "A summary of how strongly raw and norm readings disagree over the whole depth: low, "
        "medium or high.",
    ),
    (
        "control",
        "A prompt about another subject, with the wrong answer as foil. A signal that appears "
        "there too does not belong to the fact.",
    ),
    (
        "without filler (ablation)",
        "The same prompt without its stylistic filler. A milestone that moves a lot depends on "
        "wording rather than on the fact.",
    ),
)
