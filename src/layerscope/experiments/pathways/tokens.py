"""Which tokens go with the selected features: associations, drivers, and what they write for."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from layerscope.experiments.pathways.corpus import PROMPTS, Text, corpora
from layerscope.experiments.pathways.encoding import Encoder, texts_schema
from layerscope.experiments.pathways.manifest import Chunks, StageResult, write_parquet
from layerscope.experiments.pathways.targets import selected
from layerscope.experiments.pathways.words import by_words
from layerscope.experiments.pathways.workspace import (
    CHUNKS,
    FEATURE_FIGURES,
    TOKENS,
    TOKENS_JSON,
    WORDS,
    SampledPrompt,
    Workspace,
)
from layerscope.experiments.units import Piece, Progress, Work, run_units, work_key
from layerscope.features.association import Activations, AssociationOptions, associate
from layerscope.features.drivers import drivers, logit_weights
from layerscope.features.text_quality import TextQuality, text_quality
from layerscope.files import write_json
from layerscope.models import Prompt

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_TEXTS = 64  # of one resumable chunk


def run_tokens(work: Workspace, key: str, progress: Progress | None = None) -> StageResult:
    """Write token associations, per corpus, with what is known of every feature."""
    config = work.config
    features = selected(work)
    prompts = work.sampled_prompts()
    texts = corpora(config, prompts)
    encoder = Encoder(work, features, prompts)

    def one(first: int) -> Piece:
        rows, nats = encoder.encode(texts[first : first + _TEXTS], first)
        return Piece(rows, {"nats": nats})

    works = [
        Work(
            work_key(key, first), lambda first=first: one(first), len(texts[first : first + _TEXTS])
        )
        for first in range(0, len(texts), _TEXTS)
    ]
    pieces = run_units(works, units=Chunks(work.path(f"{CHUNKS}/tokens")), progress=progress)
    nats = [value for piece in pieces for value in piece.payload["nats"]]
    entries = pl.concat([piece.rows for piece in pieces]) if pieces else texts_schema()
    strings = work.model.token_strings()
    quality = _quality(texts, nats)
    flagged = {name: reason for name, (_, reason) in quality.items() if reason}
    table, corpus_counts = _associations(work, texts, entries, features, strings)
    table = table.with_columns(degenerate_share=_degenerate(texts, flagged, table["corpus"]))
    spoken, vocabulary = by_words(entries, texts)
    words, word_counts = _associations(work, texts, spoken, features, vocabulary)
    words = words.with_columns(degenerate_share=_degenerate(texts, flagged, words["corpus"]))
    words = words.drop("token_id").rename({"token": "word"})
    traced, logits = _traced(work, features, prompts, entries, strings), _logits(work, features)
    write_parquet(work.path(TOKENS), table)
    write_parquet(work.path(WORDS), words)
    write_parquet(work.path(FEATURE_FIGURES), _figures(work, features, entries, nats))
    rows = table.to_dicts()
    by_feature: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["q"] < config.fdr and len(by_feature[row["feature"]]) < config.top_tokens:
            by_feature[row["feature"]].append(row)
    content = {
        "schema_version": SCHEMA_VERSION,
        "space": work.every_dictionary.space.name,
        "corpora": corpus_counts,
        "quality": {
            name: {**vars(found), "degenerate": reason} for name, (found, reason) in quality.items()
        },
        "features": [
            {
                "feature": feature["feature"],
                "layer": feature["layer"],
                "feature_id": feature["feature_id"],
                "tokens": by_feature.get(feature["feature"], []),
                "logit_weights": logits[index],
                "drivers": traced.get(feature["feature"]),
            }
            for index, feature in enumerate(features)
        ],
    }
    write_json(work.path(TOKENS_JSON), content, indent=None)
    significant = table.filter(pl.col("q") < config.fdr).height
    incomplete = sum(1 for each in traced.values() if not each["complete"])
    notes = [f"responses under {name} look degenerate: {why}" for name, why in flagged.items()]
    if incomplete:
        notes.append(f"integrated gradients of {incomplete} features do not add up within 2%")
    summary = {
        "rows": table.height,
        "word_rows": words.height,
        "words": {name: counts["tokens"] for name, counts in word_counts.items()},
        "significant": significant,
        "features_with_tokens": len(by_feature),
        "corpora": corpus_counts,
        "degenerate": flagged,
        "traced": len(traced),
    }
    _log.info("%d token rows, %d of them with q < %g", table.height, significant, config.fdr)
    if entries.height and spoken.is_empty():
        notes.append("the tokenizer does not say where tokens stand: there is no table of words")
    outputs = (TOKENS, TOKENS_JSON, WORDS, FEATURE_FIGURES)
    return StageResult(summary, outputs, 1 if notes else 0, tuple(notes))


def _associations(
    work: Workspace,
    texts: Sequence[Text],
    entries: pl.DataFrame,
    features: Sequence[dict[str, Any]],
    strings: Sequence[str],
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Associate within every corpus by itself."""
    config = work.config
    options = AssociationOptions(
        min_count=config.min_count,
        min_joint=config.min_joint,
        permutations=config.permutations,
        fdr=config.fdr,
        seed=config.seed,
    )
    parts: list[pl.DataFrame] = []
    counts: dict[str, Any] = {}
    for corpus in dict.fromkeys(text.corpus for text in texts):
        members = [index for index, text in enumerate(texts) if text.corpus == corpus]
        rows = entries.filter(pl.col("text").is_in(members))
        found = _activations(rows, len(features))
        table = associate(found, options).with_columns(corpus=pl.lit(corpus))
        counts[corpus] = {
            "texts": len(members),
            "tokens": len(found.tokens),
            "rows": table.height,
            "permutations": int(table["permutations"].max() or 0) if table.height else 0,  # type: ignore[arg-type]
        }
        parts.append(table)
    whole = pl.concat(parts)
    named = pl.DataFrame(
        {
            "feature": range(len(features)),
            "space": [feature["space"] for feature in features],
            "layer": [feature["layer"] for feature in features],
            "feature_id": [feature["feature_id"] for feature in features],
            "name": [feature["feature"] for feature in features],
        }
    )
    whole = whole.join(named, on="feature", how="left", maintain_order="left").drop("feature")
    token = pl.Series("token", [strings[each] for each in whole["token_id"]], dtype=pl.String)
    first = ["space", "layer", "feature_id", "feature", "corpus", "token_id", "token"]
    whole = whole.rename({"name": "feature"}).with_columns(token)
    rest = [name for name in whole.columns if name not in first]
    return whole.select(*first, *rest), counts


def _activations(rows: pl.DataFrame, n_features: int) -> Activations:
    """Turn entries (one per counted token, with lists of active features) into flat arrays."""
    rows = rows.sort("text", "position")
    _, clusters = np.unique(rows["text"].to_numpy(), return_inverse=True)
    flat = (
        rows.select("features", "values")
        .with_row_index("place")
        .explode("features", "values")
        .drop_nulls()
    )
    return Activations(
        tokens=rows["token_id"].to_numpy(),
        clusters=clusters,
        feature=flat["features"].to_numpy().astype(np.int64),
        place=flat["place"].to_numpy().astype(np.int64),
        value=flat["values"].to_numpy().astype(np.float64),
        n_features=n_features,
    )


def _quality(
    texts: Sequence[Text], nats: Sequence[float | None]
) -> dict[str, tuple[TextQuality, str | None]]:
    """Judge responses condition by condition, against those made without an edit."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        if text.corpus != PROMPTS:
            groups[text.condition or text.corpus].append(index)
    found = {
        name: text_quality(
            [texts[index].text for index in members],
            nats_per_token=_mean([nats[index] for index in members]),
        )
        for name, members in sorted(groups.items())
    }
    usual = {
        name.split("_", 1)[0]: one for name, one in found.items() if name.endswith("_baseline")
    }
    return {
        name: (one, one.degenerate(usual.get(name.split("_", 1)[0]))) for name, one in found.items()
    }


def _degenerate(
    texts: Sequence[Text], flagged: Mapping[str, str], corpora_of_rows: pl.Series
) -> pl.Series:
    """Return, for every row, the share of its corpus' texts that look degenerate."""
    shares: dict[str, float] = {}
    for corpus in dict.fromkeys(text.corpus for text in texts):
        members = [text for text in texts if text.corpus == corpus]
        bad = sum((text.condition or text.corpus) in flagged for text in members)
        shares[corpus] = bad / len(members)
    return pl.Series([shares[corpus] for corpus in corpora_of_rows], dtype=pl.Float64)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figures(
    work: Workspace,
    features: Sequence[dict[str, Any]],
    entries: pl.DataFrame,
    nats: Sequence[float | None],
) -> pl.DataFrame:
    """Return density, largest value, decoder norm and nearest neighbour of every feature."""
    flat = entries.select("features", "values").explode("features", "values").drop_nulls()
    each = flat.group_by("features").agg(
        n_active=pl.len(),
        max_activation=pl.col("values").max(),
        mean_active=pl.col("values").mean(),
    )
    known = {row[0]: row[1:] for row in each.iter_rows()}
    rows: list[dict[str, Any]] = []
    by_layer: dict[int, list[int]] = defaultdict(list)
    for index, feature in enumerate(features):
        by_layer[feature["layer"]].append(index)
    norms: dict[int, float] = {}
    near: dict[int, tuple[int, float] | None] = {}
    for layer, members in by_layer.items():
        ids = [features[index]["feature_id"] for index in members]
        directions = work.every_dictionary[layer].write_directions(ids).double().cpu()
        lengths = directions.norm(dim=1)
        unit = directions / lengths.clamp_min(1e-30)[:, None]
        cosine = unit @ unit.T - 2 * torch.eye(len(ids), dtype=torch.float64)
        for row, index in enumerate(members):
            norms[index] = float(lengths[row])
            best = int(cosine[row].argmax())
            near[index] = (ids[best], float(cosine[row, best])) if len(ids) > 1 else None
    for index, feature in enumerate(features):
        count, largest, mean = known.get(index, (0, None, None))
        closest = near[index]
        rows.append(
            {
                "space": feature["space"],
                "layer": feature["layer"],
                "feature_id": feature["feature_id"],
                "tokens_seen": entries.height,
                "density": count / entries.height if entries.height else None,
                "max_activation": largest,
                "mean_when_active": mean,
                "decoder_norm": norms[index],
                "nearest_feature": None if closest is None else closest[0],
                "nearest_cosine": None if closest is None else closest[1],
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _logits(work: Workspace, features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what every feature writes for on the direct path, as token strings."""
    strings = work.model.token_strings()
    directions = torch.stack(
        [
            work.every_dictionary[f["layer"]].write_directions([f["feature_id"]])[0].float()
            for f in features
        ]
    )
    found = logit_weights(work.model, directions, top=work.config.top_tokens)

    def named(pairs: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token_id": i, "token": strings[i], "z": round(z, 6)} for i, z in pairs]

    return [
        {"path": "direct", "top": named(each["top"]), "bottom": named(each["bottom"])}
        for each in found
    ]


def _traced(
    work: Workspace,
    features: Sequence[dict[str, Any]],
    prompts: Sequence[SampledPrompt],
    entries: pl.DataFrame,
    strings: Sequence[str],
) -> Mapping[str, dict[str, Any]]:
    """Trace the features of the largest effects on the prompt where each is most active."""
    chosen = sorted(range(len(features)), key=lambda i: (-abs(features[i]["cohen_d"]), i))
    found: dict[str, dict[str, Any]] = {}
    flat = entries.filter(pl.col("text") < len(prompts)).explode("features", "values").drop_nulls()
    for index in chosen[: work.config.drivers]:
        feature = features[index]
        mine = flat.filter(pl.col("features") == index)
        mine = mine.sort("values", "text", "position", descending=[True, False, False])
        if mine.is_empty():  # silent on every prompt: its value at the end of the first
            place, position = 0, len(prompts[0].ids) - 1
        else:
            place, position = mine["text"][0], mine["position"][0]
        prompt = prompts[place]
        batch = work.model.tokenize(Prompt(prompt.text, format="raw"))
        dictionary = work.every_dictionary[feature["layer"]]
        made = drivers(work.model, batch, dictionary, feature["feature_id"], position)
        rows = made.table.to_dicts()
        for row in rows:
            row["token"] = strings[row["token_id"]]
        found[feature["feature"]] = {
            "prompt_id": prompt.id,
            "position": position,
            "pre_activation": made.value,
            "baseline_pre_activation": made.baseline,
            "steps": made.steps,
            "gap": made.gap,
            "complete": made.complete,
            "tokens": rows,
        }
    return found
