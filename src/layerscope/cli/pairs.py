"""What commands on prompt pairs share: their options, and what a run of theirs is kept under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from layerscope.cli.common import console, emit_json

if TYPE_CHECKING:
    from layerscope.cli.keep import KeepOptions, Kept, Page
    from layerscope.experiments.units import Outcome
    from layerscope.interventions.patching import Cost, PromptPair
    from layerscope.models import LanguageModel

PairsOption = Annotated[
    Path,
    typer.Option(
        "--pairs",
        help="YAML, CSV or JSON of clean and corrupt prompts with answers; see docs/patching.md.",
    ),
]
PromptsOption = Annotated[
    Path,
    typer.Option(
        "--prompts",
        help="YAML, CSV or JSON of prompt, answer and foil; or of pairs, whose clean prompts are "
        "taken.",
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Take only the first so many.")
]
KeepWrongOption = Annotated[
    bool, typer.Option("--keep-wrong", help="Keep those that the model does not answer.")
]
NoiseOption = Annotated[
    bool, typer.Option("--noise", help="Put corrupt values into the clean run instead.")
]
DirectionOption = Annotated[
    str,
    typer.Option(
        "--direction",
        help="noise: corrupt values into the clean run; denoise: the other way about.",
    ),
]
MetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        help="logit_diff, logit, prob, prob_diff, logprob, kl, rank; may be repeated, the first is "
        "ranked. Default: logit_diff.",
    ),
]
MetricOption = Annotated[str, typer.Option("--metric", help="logit_diff, logit, logprob or prob.")]


def asked(pairs: Sequence[PromptPair]) -> list[dict[str, Any]]:
    """Return pairs as the store keeps prompts."""
    return [{"prompt": pair.clean, **pair.to_dict()} for pair in pairs]


class _Config(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class Planned(Protocol):
    """A run of any experiment that says what it will cost."""

    @property
    def model(self) -> LanguageModel:
        """What it runs on."""
        ...

    @property
    def config(self) -> _Config:
        """Its settings."""
        ...

    @property
    def cost(self) -> Cost:
        """What it computes."""
        ...

    @property
    def seconds(self) -> float | None:
        """What that is predicted to take."""
        ...

    def describe(self) -> str:
        """Return the plan in one line."""
        ...


def carry_out(
    name: str,
    planned: Planned,
    execute: Callable[..., Outcome],
    *,
    prompts: Sequence[Mapping[str, Any]],
    page: Page,
    unit: str,
    options: KeepOptions,
    plan_only: bool,
    as_json: bool,
) -> Kept | None:
    """Print the plan, carry it out inside the store, and return what is to be shown.

    None where nothing is: only the plan was wanted, or JSON, which is then on stdout.
    """
    from layerscope.cli.keep import keep

    console(stderr=True).print(planned.describe(), highlight=False, soft_wrap=True)
    if plan_only:
        if as_json:
            emit_json({**planned.cost.to_dict(), "seconds": planned.seconds})
        return None
    kept = keep(
        name,
        config=planned.config.to_dict(),
        model=planned.model.provenance(),
        prompts=prompts,
        execute=lambda units, progress: execute(planned, units=units, progress=progress),
        page=page,
        options=options,
        unit=unit,
    )
    if as_json:
        emit_json(kept.to_dict())
        return None
    return kept
