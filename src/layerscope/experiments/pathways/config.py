"""What a run of the pathways pipeline is told: data, model, dictionaries, and every threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from layerscope.errors import ConfigError, nearest

CONDITIONS = (
    "safe_baseline",
    "safe_with_safe_patch",
    "safe_with_risky_patch",
    "risky_baseline",
    "risky_with_safe_patch",
    "risky_with_risky_patch",
)
# Names under which other stages and plans of the same study wrote the six conditions.
ALIASES = {
    "safe_amplification": "safe_with_safe_patch",
    "risky_amplification": "risky_with_risky_patch",
    "safe_prompt_safe_mean_patch": "safe_with_safe_patch",
    "safe_prompt_risky_mean_patch": "safe_with_risky_patch",
    "risky_prompt_safe_mean_patch": "risky_with_safe_patch",
    "risky_prompt_risky_mean_patch": "risky_with_risky_patch",
}
CHECKPOINTS = ("checkpoint_L*.json", "comprehensive_patching_checkpoint_*.json")
RESPONSES = ("responses_L*.json", "response_logs/*.json", "response_logs/*.jsonl")

Duplicates = Literal["newest", "error"]
Dedup = Literal["sum", "max"]


@dataclass(frozen=True, kw_only=True)
class PathwaysConfig:
    """One run of the pipeline.

    Attributes:
        data: folder of checkpoints and response logs.
        model: name or folder. dictionaries: folder or repository.
        prompts: file of prompts; None for ``prompts.json`` of the data folder.
        checkpoints, responses: globs below `data`, searched in every subfolder.
        conditions: that every feature should have been tried in. aliases: other names of them.
        sample: audit only so many files of each kind, drawn by `seed`; None for all.
        empty_rate: share of empty responses beyond which the audit fails.
        min_trials, expected_trials: per feature and condition.
        min_coverage: least share of causal features with responses.
        min_parse_rate: least share of responses that could be parsed.
        min_unique: least share of distinct responses among trials (greedy copies are no sample).
        duplicates: what happens to one feature with two verdicts: the newest counts, or an error.
        allow_mismatch: go on with data of another model; results are stamped.
        top_n_per_layer: causal features kept per layer, by absolute Cohen's d.
        layer0: let features of block 0 be sources and targets.
        n_prompts: at most so many prompts, in file order; None for all.
        position: of the targets in each prompt; -1 is the last token.
        prototype_feature: "L3-17", tried before all others; None for the largest effect of the
            highest layer.
        top_k_pathways: edges kept per target and prompt.
        variant, error, positions, order, min_share: see `DiscoverOptions`.
        gradient_threshold: least absolute gradient, which depends on the dictionary's scale; 0.1
            was the rule of earlier work.
        doses, nulls: see `ReplayOptions`.
        dedup: how edges of one pair of features at several positions become one.
        batch_size: targets of one resumable chunk; the result does not depend on it beyond
            rounding.
        memory_limit_gb: the plan and the prototype must stay below it.
        texts: further text whose tokens are counted, one JSON line or line each.
        max_texts: responses and further texts that are read, each, drawn by `seed`.
        min_count: occurrences a token needs. min_joint: with the feature active.
        permutations: at most so many of the token test. fdr: false discovery rate of every table.
        drivers: features whose input tokens are traced (by gradients and leave-one-out).
        top_tokens: rows per feature in summaries.
        seed, device, dtype: of everything.
        source_compat: the names and rules of earlier work (set by `source_compat_of`).
    """

    data: str
    model: str
    dictionaries: str
    prompts: str | None = None
    checkpoints: tuple[str, ...] = CHECKPOINTS
    responses: tuple[str, ...] = RESPONSES
    conditions: tuple[str, ...] = CONDITIONS
    aliases: tuple[tuple[str, str], ...] = tuple(ALIASES.items())
    sample: int | None = None
    empty_rate: float = 0.01
    min_trials: int = 20
    expected_trials: int = 30
    min_coverage: float = 0.5
    min_parse_rate: float = 0.8
    min_unique: float = 0.5
    duplicates: Duplicates = "newest"
    allow_mismatch: bool = False
    top_n_per_layer: int = 50
    layer0: bool = True
    n_prompts: int | None = None
    position: int = -1
    prototype_feature: str | None = None
    top_k_pathways: int = 25
    variant: str = "total"
    error: str = "passthrough"
    positions: str = "all"
    order: str = "attribution"
    min_share: float = 0.0
    gradient_threshold: float = 0.0
    doses: tuple[float, ...] = (0.75, 0.5, 0.0, 2.0)
    nulls: int = 8
    dedup: Dedup = "sum"
    batch_size: int | None = None
    memory_limit_gb: float = 28.0
    texts: str | None = None
    max_texts: int = 2000
    min_count: int = 10
    min_joint: int = 5
    permutations: int = 10_000
    fdr: float = 0.05
    drivers: int = 10
    top_tokens: int = 10
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    source_compat: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("duplicates", get_args(Duplicates)),
            ("dedup", get_args(Dedup)),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"unknown {name} '{getattr(self, name)}'; use {' or '.join(known)}"
                )
        for name in ("top_n_per_layer", "top_k_pathways", "min_count", "permutations", "max_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("sample", "n_prompts", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more, or left out")
        if not 0 < self.fdr < 1:
            raise ConfigError(f"fdr is {self.fdr}; it must lie between 0 and 1")
        if not self.conditions:
            raise ConfigError("conditions is empty; name the conditions of the experiment")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {**asdict(self), "aliases": dict(self.aliases)}

    def part(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return some fields, which are what one stage depends on."""
        whole = self.to_dict()
        return {name: whole[name] for name in names}


def read_config(path: str | Path | None, **given: Any) -> PathwaysConfig:
    """Read a YAML file, and let options that are not None replace its fields.

    Relative paths of the file are relative to it.

    Raises:
        ConfigError: the file cannot be read, a field is unknown, or one is missing.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _load(Path(path))
    values.update({name: value for name, value in given.items() if value is not None})
    known = {field.name for field in fields(PathwaysConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown field '{name}' in the configuration{nearest(name, known)}")
    missing = [name for name in ("data", "model", "dictionaries") if not values.get(name)]
    if missing:
        raise ConfigError(f"the configuration lacks {', '.join(missing)}")
    compat = bool(values.pop("source_compat", False))
    try:
        config = PathwaysConfig(**{name: _plain(name, value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"a field of the configuration has the wrong type: {error}") from None
    return source_compat_of(config, explicit=frozenset(values)) if compat else config


def source_compat_of(
    config: PathwaysConfig, *, explicit: frozenset[str] = frozenset()
) -> PathwaysConfig:
    """Return the configuration with the rules of earlier work, to compare old outputs.

    Sources at the target's own position only, candidates by activation, |gradient| > 0.1, no
    features of block 0. Fields named in `explicit` keep their value.
    """
    earlier: dict[str, Any] = {
        "positions": "last",
        "order": "activation",
        "gradient_threshold": 0.1,
        "layer0": False,
    }
    changed = {name: value for name, value in earlier.items() if name not in explicit}
    return replace(config, **changed, source_compat=True)


def _load(path: Path) -> dict[str, Any]:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds no configuration: write `field: value` lines")
    values = {str(name): value for name, value in cast("Mapping[Any, Any]", content).items()}
    for name in ("data", "prompts", "texts", "model", "dictionaries"):
        value = values.get(name)
        # A model may be a name on the hub: only what exists beside the file is a path.
        if isinstance(value, str) and (path.parent / value).exists():
            values[name] = str(path.parent / value)
    return values


def _plain(name: str, value: Any) -> Any:
    if name == "aliases" and isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return tuple((str(key), str(meant)) for key, meant in pairs)
    if isinstance(value, list):
        return tuple(cast("list[Any]", value))
    if isinstance(value, Path):
        return str(value)
    return value
