"""What an attribution run is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from layerscope.errors import ConfigError, nearest
from layerscope.interventions.attribution.contrast import Direction
from layerscope.interventions.attribution.edges import QK
from layerscope.interventions.attribution.pairs import METRICS, MetricName
from layerscope.interventions.attribution.quadrature import RULES, Rule

Method: TypeAlias = Literal["atp", "ig", "ig-activations", "atp-star"]
METHODS: tuple[Method, ...] = ("atp", "ig", "ig-activations", "atp-star")


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """Settings of a run.

    Attributes:
        sites: groups of nodes, or sites; see `nodes.GROUPS`.
        method: "atp" (attribution patching), "ig" (integrated gradients over inputs),
            "ig-activations" (along each site's own path) or "atp-star".
        metric: what effects are effects on.
        direction: "noise" puts corrupt values into the clean run, "denoise" the other way about.
        rule: of integrated gradients, and of edges unless that is None for them.
        steps: passes along a path.
        positions: score nodes at every position, not at all of them together.
        verify: strongest nodes that are patched exactly. sample: others, drawn at random.
        edges: also score every edge, and run circuits of growing size.
        edge_rule: average the gradients of edges along inputs by this rule; None for the base run.
        qk: "recomputed" computes the softmax again for edges into queries and keys.
        circuit: edges of the circuit that is drawn.
        keep_wrong: keep pairs whose clean prompt the model does not answer.
        pairs_per_unit: pairs of one work unit (and of one batch).
        seed: of the sample.
    """

    sites: tuple[str, ...] = ("heads", "mlp_out")
    method: Method = "atp"
    metric: MetricName = "logit_diff"
    direction: Direction = "noise"
    rule: Rule = "midpoint"
    steps: int = 5
    positions: bool = False
    verify: int = 20
    sample: int = 20
    edges: bool = True
    edge_rule: Rule | None = None
    qk: QK = "linear"
    circuit: int = 50
    keep_wrong: bool = False
    pairs_per_unit: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, tuple[object, tuple[object, ...]]] = {
            "method": (self.method, METHODS),
            "metric": (self.metric, METRICS),
            "direction": (self.direction, ("noise", "denoise")),
            "rule": (self.rule, RULES),
            "edge_rule": (self.edge_rule, (None, *RULES)),
            "qk": (self.qk, ("linear", "recomputed")),
        }
        for name, (value, choices) in known.items():
            if value not in choices:
                names = [str(choice) for choice in choices]
                raise ConfigError(
                    f"unknown {name} '{value}'{nearest(str(value), names)}; use {', '.join(names)}"
                )
        if not self.sites:
            raise ConfigError("name at least one group of nodes, such as heads or mlp_out")
        for name in ("steps", "circuit", "pairs_per_unit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if min(self.verify, self.sample) < 0 or not self.verify + self.sample:
            raise ConfigError("verify or sample must be 1 or more: no prediction goes unchecked")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        return {**asdict(self), "sites": list(self.sites)}
