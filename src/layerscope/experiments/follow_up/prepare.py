"""What a follow-up asks: tokenised and checked, nothing computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from layerscope.errors import ConfigError
from layerscope.experiments import battery as observation
from layerscope.experiments.battery import Battery
from layerscope.experiments.battery.prepare import prepare_battery
from layerscope.experiments.follow_up.config import FollowUpConfig
from layerscope.experiments.follow_up.facts import Prompt, prompt_of
from layerscope.models import LanguageModel


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything tokenised and checked, nothing computed.

    Attributes:
        observed: the battery's own plan, which finds the onsets.
        prompts: the plain question of every item. paraphrases: rewordings, by item.
        contrasts: other questions about the same subjects, for the directions.
    """

    model: LanguageModel
    battery: Battery
    config: FollowUpConfig
    observed: observation.Plan
    prompts: tuple[Prompt, ...]
    paraphrases: Mapping[str, tuple[Prompt, ...]]
    contrasts: tuple[Prompt, ...]

    def content(self) -> list[dict[str, Any]]:
        """Return what is asked, JSON-able: the content of the run."""
        more = self.read()[len(self.prompts) :]
        extra = [{"item": p.item.key, "variant": p.variant, "ids": list(p.ids)} for p in more]
        return [*self.observed.prompts(), *extra]

    def read(self) -> list[Prompt]:
        """Return every prompt of the run: plain questions, then contrasts, then rewordings."""
        reworded = [prompt for some in self.paraphrases.values() for prompt in some]
        return [*self.prompts, *self.contrasts, *reworded]


def plan(
    model: LanguageModel,
    battery: Battery | None = None,
    config: FollowUpConfig | None = None,
    *,
    contrasts: Battery | None = None,
) -> Plan:
    """Tokenise and check everything.

    Args:
        battery: the facts; the shipped ones by default.
        contrasts: where other questions about the same subjects are taken from, for directions;
            the battery itself by default.

    Raises:
        ConfigError: the battery has no item in the configured language.
        LensError, PromptError: as for the battery.
    """
    battery, config = battery or Battery.builtin(), config or FollowUpConfig()
    spoken = sorted({item.language for item in battery.items})
    if config.language not in spoken:
        raise ConfigError(
            f"battery {battery.name!r} has no item in {config.language!r}; "
            f"set language to one of {', '.join(spoken)}"
        )
    base = replace(config.battery, parts=())
    observed = observation.plan(model, battery, base)
    prompts = [prompt_of(entry) for entry in observed.prepared.asked]
    paraphrases: dict[str, list[Prompt]] = defaultdict(list)
    if config.paraphrases:
        own = battery.select(languages=[config.language])
        reworded = prepare_battery(model, own, replace(base, parts=("paraphrases",)))
        for entry in reworded.asked:
            if entry.question.part == "paraphrases":
                key = entry.question.item.key
                if len(paraphrases[key]) < config.paraphrases:
                    paraphrases[key].append(prompt_of(entry))
    return Plan(
        model,
        battery,
        config,
        observed,
        tuple(prompts),
        {key: tuple(some) for key, some in paraphrases.items()},
        tuple(_contrasts(model, battery, contrasts or battery, config)),
    )


def _contrasts(
    model: LanguageModel, battery: Battery, source: Battery, config: FollowUpConfig
) -> list[Prompt]:
    """Return the questions of all relations about the battery's subjects, in one language."""
    names = {item.entity or item.subject for item in battery.items if not item.invented}
    chosen = tuple(
        item
        for item in source.items
        if not item.invented
        and item.language == config.language
        and (item.entity or item.subject) in names
    )
    if not chosen:
        return []
    own = Battery(source.name, chosen, source.wordings, (), source.shared)
    prepared = prepare_battery(model, own, replace(config.battery, parts=()))
    return [prompt_of(entry) for entry in prepared.asked]
