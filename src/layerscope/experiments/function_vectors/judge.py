"""From rows to a verdict: which heads and layer were chosen, what was gained, what to doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.function_vectors.config import FunctionVectorConfig
from layerscope.experiments.function_vectors.sweep import HeadSet

LEAST_GAIN = 0.1  # of accuracy, over no vector and over the best of random heads
_KEYS = ("part", "setting", "kind", "heads", "draw", "layer")


def accuracies(queries: pl.DataFrame) -> pl.DataFrame:
    """Return one row per condition: number of queries, top-1 and top-5 accuracy, P(answer)."""
    return queries.group_by(_KEYS, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("queries"),
        pl.col("correct").mean().alias("top1"),
        (pl.col("rank") <= 5).mean().alias("top5"),
        pl.col("probability").mean().alias("probability"),
    )


def summarise(
    sweep: pl.DataFrame,
    heads: pl.DataFrame,
    baselines: Mapping[str, Any],
    config: FunctionVectorConfig,
    sets: Sequence[HeadSet],
) -> dict[str, Any]:
    """Choose size and layer on the validation queries, and say what they do on the test."""
    chosen = _choose(sweep)
    size, layer = int(chosen["heads"]), int(chosen["layer"])
    found = next(each for each in sets if each.kind == "vector" and len(each.heads) == size)
    test: dict[str, dict[str, Any]] = {}
    for setting in ("zero_shot", "shuffled"):
        of = sweep.filter(part="test", setting=setting)
        draws = of.filter(kind="random", heads=size, layer=layer)["top1"].to_list()
        own = of.filter(kind="random_in_place", heads=size)["top1"].to_list()
        test[setting] = {
            "none": of.filter(kind="none")["top1"].item(),
            "vector": of.filter(kind="vector", heads=size, layer=layer)["top1"].item(),
            "random_mean": sum(draws) / len(draws) if draws else None,
            "random_best": max(draws) if draws else None,
            "in_place": of.filter(kind="in_place", heads=size)["top1"].item(),
            "in_place_random_mean": sum(own) / len(own) if own else None,
        }
    test["clean"] = {"none": sweep.filter(part="test", setting="clean")["top1"].item()}
    zero = test["zero_shot"]
    gains = {
        "over_none": zero["vector"] - zero["none"],
        "over_random": None
        if zero["random_mean"] is None
        else zero["vector"] - zero["random_mean"],
    }
    summary: dict[str, Any] = {
        "corruption": baselines["corruption"],
        "chosen": {
            "heads": [list(head) for head in found.heads],
            "layer": layer,
            "validation_top1": chosen["top1"],
        },
        "test_queries": sweep.filter(part="test", setting="clean")["queries"].item(),
        "test_top1": test,
        "gain_zero_shot": gains,
        "transfer": _transfer(zero, config),
        "baselines": dict(baselines),
    }
    summary["warnings"] = _warnings(summary, heads, config)
    return summary


def _transfer(zero: Mapping[str, Any], config: FunctionVectorConfig) -> dict[str, Any]:
    """Say whether the vector carries the task to prompts without examples, where that can be."""
    low, high = config.transfer_band
    plain, best = zero["none"], zero["random_best"]
    rival = plain if best is None else max(plain, best)
    claim: dict[str, Any] = {"zero_shot": plain, "band": [low, high], "over_rivals": None}
    if not low <= plain <= high:
        reason = (
            f"without examples or vector {plain:.0%} are right, outside the {low:.0%} to "
            f"{high:.0%} in which a gain says that the task was carried over"
        )
        return {**claim, "verdict": "refused", "reason": reason}
    gain = zero["vector"] - rival
    held = gain >= LEAST_GAIN
    than = "no vector and any vector of random heads"
    reason = f"{abs(gain):.0%} {'more' if gain >= 0 else 'fewer'} right than with {than}"
    return {
        **claim,
        "over_rivals": gain,
        "verdict": "supported" if held else "not supported",
        "reason": reason,
    }


def in_texts(sweep: pl.DataFrame) -> list[dict[str, Any]]:
    """Return for each natural text the top-1 accuracy without, with, and with random vectors."""
    found: list[dict[str, Any]] = []
    for (text,), of in sweep.filter(part="text").group_by(["setting"], maintain_order=True):
        draws = of.filter(kind="random")["top1"]
        found.append(
            {
                "text": text,
                "queries": of.filter(kind="none")["queries"].item(),
                "none": of.filter(kind="none")["top1"].item(),
                "vector": of.filter(kind="vector")["top1"].item(),
                "random_mean": draws.mean(),
                "random_best": draws.max(),
            }
        )
    return found


def _choose(sweep: pl.DataFrame) -> dict[str, Any]:
    """The best zero-shot accuracy; among equals fewer heads, then the likelier answers."""
    tried = sweep.filter(part="validation", setting="zero_shot", kind="vector")
    ranked = tried.sort(
        ["top1", "heads", "probability", "layer"], descending=[True, False, True, False]
    )
    return ranked.row(0, named=True)


def _warnings(
    summary: Mapping[str, Any], heads: pl.DataFrame, config: FunctionVectorConfig
) -> list[str]:
    notes: list[str] = []
    base, test = summary["baselines"], summary["test_top1"]
    if base["shuffled_top1"] >= base["hardly_hurt"] * base["clean_top1"]:
        notes.append(
            f"shuffling the examples' answers hardly hurts ({base['shuffled_top1']:.0%} right "
            f"against {base['clean_top1']:.0%}): this model tells the task from the answers alone, "
            "so shuffled prompts cannot show which heads carry it; effects are measured in "
            f"{'prompts without examples' if base['corruption'] == 'zero_shot' else 'them anyway'}"
        )
    if base["clean_top1"] < 0.5:
        notes.append(
            f"with examples the model answers only {base['clean_top1']:.0%}: it may not know the "
            "task, and means are over few prompts"
        )
    chosen = {tuple(head) for head in summary["chosen"]["heads"]}
    unsure = [
        f"{layer}.{head}"
        for layer, head, low in heads.select("layer", "head", "low").rows()
        if (layer, head) in chosen and low <= 0
    ]
    if unsure:
        notes.append(
            f"the interval of the effect of {', '.join(unsure)} includes zero: measure in more "
            "prompts, or use fewer heads"
        )
    zero, transfer = test["zero_shot"], summary["transfer"]
    if transfer["verdict"] == "refused":
        notes.append(
            f"no claim of transfer: {transfer['reason']}; test on queries that several tasks could "
            "ask"
        )
    if zero["random_mean"] is not None and zero["vector"] - zero["random_mean"] < 0.1:
        notes.append(
            "the vector does hardly better than vectors of random heads: this is no evidence for "
            "heads of this task"
        )
    if summary["test_queries"] < 20:
        notes.append(
            f"accuracies are over {summary['test_queries']} test queries; one of them is "
            f"{1 / summary['test_queries']:.0%}"
        )
    return notes
