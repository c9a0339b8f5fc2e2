"""Which direction is fitted on which facts, and what it is tried on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

import polars as pl
import torch

from layerscope.experiments.follow_up import directions
from layerscope.experiments.follow_up.directions import Direction, Pair, Trial
from layerscope.experiments.follow_up.facts import Fact, Ledger, Prompt, split
from layerscope.experiments.follow_up.prepare import Plan
from layerscope.experiments.follow_up.slots import Slot
from layerscope.experiments.follow_up.stages import Stages, contents
from layerscope.experiments.units import Piece, Work
from layerscope.models.answers import align_answer

STAGE = "direction"
OWN, PARAPHRASES, SWITCH = "question", "paraphrases", "other question"
RELATION, SUBJECT = "relation", "subject"
VECTOR_SCHEMA = {
    "relation": pl.String,
    "block": pl.Int32,
    "facts": pl.Int32,
    "held_out": pl.Int32,
    "split_half": pl.Float64,
    "typical_norm": pl.Float64,
    "vector": pl.List(pl.Float64),
}


def steer_relations(
    planned: Plan, facts: Sequence[Fact], items: pl.DataFrame, stages: Stages, ledger: Ledger
) -> tuple[dict[str, pl.DataFrame], dict[str, Any]]:
    """Fit a direction per relation, and try it on facts it was not fitted on.

    Returns:
        Tables ``directions``, ``mediation`` and ``vectors``; and per relation what was fitted.
    """
    config = planned.config
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.group[1] == config.language:
            groups[fact.group[0]].append(fact)
    ready: dict[str, tuple[list[Fact], list[Fact]]] = {}
    fits: dict[str, Work] = {}
    anchors: dict[str, tuple[int, str]] = {}
    others = _others(planned.contrasts)
    for relation, own in groups.items():
        train, held_out = split(
            own, share=config.train_share, most=config.most_train, seed=config.seed
        )
        train = [fact for fact in train if others.get((fact.clean.name, relation))]
        if len(train) < 2 or not held_out:
            for fact in own:
                reason = f"{len(train)} facts to fit on and {len(held_out)} held out: too few"
                ledger.add(fact.clean.item, STAGE, reason)
            continue
        anchors[relation] = anchor(items, relation, config.language)
        ready[relation] = (train, held_out)
        fits[relation] = _fit(planned, relation, train, others, anchors[relation][0], stages)
    fitted = dict(zip(fits, stages.run("fit", list(fits.values())), strict=True))
    works: list[Work] = []
    for relation, piece in fitted.items():
        direction = _direction(piece)
        trials = _trials(planned, relation, ready[relation][1], others, ledger)
        pairs = _pairs(planned, relation, ready[relation][1], others)
        works += _tries(planned, relation, ready[relation][0], direction, trials, pairs, stages)
    pieces = stages.run("directions", works)
    tables = {
        "directions": _joined(pieces[::2], directions.DOSE_SCHEMA),
        "mediation": _joined(pieces[1::2], directions.MEDIATION_SCHEMA),
        "vectors": _joined(list(fitted.values()), VECTOR_SCHEMA).with_columns(
            pl.Series("held_out", [len(ready[r][1]) for r in fitted], dtype=pl.Int32)
        ),
    }
    account = {
        relation: {
            **_direction(piece).to_dict(),
            "anchor": anchors[relation][1],
            "held_out": len(ready[relation][1]),
        }
        for relation, piece in fitted.items()
    }
    return tables, account


def anchor(items: pl.DataFrame, relation: str, language: str) -> tuple[int, str]:
    """Return the block of the median causal onset of MLPs, or of blocks where none reaches it."""
    own = items.filter((pl.col("relation") == relation) & (pl.col("language") == language))
    for column, name in (("onset_mlp_out", "mlp"), ("causal", "block"), ("observed", "observed")):
        known = own[column].drop_nulls().to_list()
        if 2 * len(known) >= own.height:  # half of the facts at least, so that it stands for them
            return max(int(median_low(known)) - 1, 0), name
    known = own["observed"].to_list()
    return max(int(median_low(known)) - 1, 0), "observed"


def _others(contrasts: Sequence[Prompt]) -> dict[tuple[str, str], list[Prompt]]:
    """Return, by subject and relation, the questions about it of all other relations."""
    relations = sorted({prompt.item.relation for prompt in contrasts})
    found: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in contrasts:
        for relation in relations:
            if relation != prompt.item.relation:
                found[prompt.name, relation].append(prompt)
    return found


def _fit(
    planned: Plan,
    relation: str,
    train: Sequence[Fact],
    others: Mapping[tuple[str, str], Sequence[Prompt]],
    block: int,
    stages: Stages,
) -> Work:
    own = [fact.clean.slot() for fact in train]
    against = [[p.slot() for p in others[fact.clean.name, relation]] for fact in train]

    def do() -> Piece:
        found = directions.fit(planned.model, own, against, block, planned.config)
        row = (
            relation,
            found.block,
            found.facts,
            0,
            found.split_half,
            found.typical_norm,
            found.vector.double().tolist(),
        )
        return Piece(pl.DataFrame([row], schema=VECTOR_SCHEMA, orient="row"))

    content = [relation, block, contents(train), [[s.content() for s in some] for some in against]]
    return stages.work("fit", content, do)


def _direction(piece: Piece) -> Direction:
    row = piece.rows.row(0, named=True)
    vector = torch.tensor(row["vector"], dtype=torch.float64).float()
    return Direction(row["block"], vector, row["facts"], row["split_half"], row["typical_norm"])


def _trials(
    planned: Plan,
    relation: str,
    held_out: Sequence[Fact],
    others: Mapping[tuple[str, str], Sequence[Prompt]],
    ledger: Ledger,
) -> list[Trial]:
    """Return the prompts to try a direction on: held-out facts, reworded, elsewhere, switched."""
    names = {fact.clean.name for fact in held_out}
    trials: list[Trial] = []
    for fact in held_out:
        trials.append(Trial(OWN, "orig", fact.clean.slot()))
        trials += [
            Trial(PARAPHRASES, prompt.variant, prompt.slot())
            for prompt in planned.paraphrases.get(fact.key, ())
        ]
        for prompt in others.get((fact.clean.name, relation), ()):
            slot = switched(planned, fact, prompt)
            if slot is None:
                reason = f"its answer does not follow the question about its {prompt.item.relation}"
                ledger.add(fact.clean.item, "other_question", reason)
            else:
                trials.append(Trial(SWITCH, prompt.item.relation, slot))
    elsewhere = [
        prompt
        for prompt in planned.prompts
        if prompt.item.relation == relation
        and prompt.item.language != planned.config.language
        and prompt.name in names
    ]
    return trials + [Trial(prompt.item.language, "orig", prompt.slot()) for prompt in elsewhere]


def switched(planned: Plan, fact: Fact, prompt: Prompt) -> Slot | None:
    """Return another question about a fact's subject, read for the fact's own answer."""
    found = align_answer(
        planned.model.tokenizer,
        prompt.text,
        fact.clean.item.answer,
        variant=prompt.joint,
        strict=False,
    )
    if not found.ok or found.first_id in (None, prompt.answer):
        return None
    return Slot(fact.key, prompt.ids, int(found.first_id or 0), prompt.answer)


def _pairs(
    planned: Plan,
    relation: str,
    held_out: Sequence[Fact],
    others: Mapping[tuple[str, str], Sequence[Prompt]],
) -> list[Pair]:
    """Return pairs that differ in what is asked, and pairs that differ in whom it is asked of."""
    pairs: list[Pair] = []
    for fact in held_out:
        pairs.append(Pair(SUBJECT, fact.corrupted(), fact.clean.slot()))
        for prompt in others.get((fact.clean.name, relation), ()):
            slot = switched(planned, fact, prompt)
            if slot is not None:
                pairs.append(Pair(RELATION, slot, fact.clean.slot()))
    return pairs


def _tries(
    planned: Plan,
    relation: str,
    train: Sequence[Fact],
    direction: Direction,
    trials: Sequence[Trial],
    pairs: Sequence[Pair],
    stages: Stages,
) -> list[Work]:
    """Return the two units of a relation: doses, and mediation."""
    model, config = planned.model, planned.config
    fitted = [relation, direction.block, contents(train)]
    tried = [[trial.set, trial.variant, trial.slot.content()] for trial in trials]
    paired = [[pair.kind, pair.base.content(), pair.donor.content()] for pair in pairs]
    return [
        stages.work(
            "dose",
            [fitted, tried],
            lambda: directions.dose(model, relation, trials, direction, config),
        ),
        stages.work(
            "mediate",
            [fitted, paired],
            lambda: directions.mediate(model, relation, pairs, direction, config),
        ),
    ]


def _joined(pieces: Sequence[Piece], schema: Mapping[str, Any]) -> pl.DataFrame:
    return pl.concat([pl.DataFrame(schema=schema), *(piece.rows for piece in pieces)])
