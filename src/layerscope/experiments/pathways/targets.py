"""From the selected features to targets on prompts, in groups that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.pathways.workspace import (
    CAUSAL,
    SampledPrompt,
    Workspace,
    read_json,
)
from layerscope.features.library import DictionarySet
from layerscope.features.pathways import DiscoverOptions, PromptState, ReplayOptions, Target
from layerscope.models import Prompt

GROUP = 64  # targets whose edges one chunk of replays has, unless the configuration says otherwise
_LARGEST_GROUP = 512  # a killed run repeats no more than so many
_COTANGENTS = 2**30  # bytes of the gradients of one chunk's targets, before and behind a block


@dataclass(frozen=True)
class Group:
    """Some targets of one prompt: what one chunk does."""

    prompt: SampledPrompt
    first: int
    stop: int

    @property
    def name(self) -> str:
        """What the chunk is called in keys."""
        return f"{self.prompt.id}:{self.first}:{self.stop}"


def selected(work: Workspace) -> list[dict[str, Any]]:
    """Return the selected features, by layer and rank.

    Raises:
        ConfigError: they are of another feature space than the dictionaries.
    """
    content = read_json(work.need(CAUSAL, "select"))
    own = work.every_dictionary.space.name
    if content["space"] != own:
        raise ConfigError(
            f"the selected features are of '{content['space']}', the dictionaries of '{own}'; run "
            "`layerscope pathways select` again"
        )
    return content["features"]


def targets_of(work: Workspace, features: Sequence[dict[str, Any]]) -> list[Target]:
    """Return a target for every feature, at the position of the configuration."""
    space = work.every_dictionary.space
    at = work.config.position
    return [Target(space.id(f["layer"], f["feature_id"]), at) for f in features]


def group_size(work: Workspace, n_tokens: int) -> int:
    """Return how many targets of a prompt are swept together: as configured, or as memory has it.

    It depends on nothing that another machine would have otherwise, so that a run can go on there.
    """
    if work.config.batch_size is not None:
        return work.config.batch_size
    width = next(iter(work.dictionaries)).d_in
    return max(1, min(_LARGEST_GROUP, _COTANGENTS // (2 * 4 * n_tokens * width)))


def groups(work: Workspace, prompts: Sequence[SampledPrompt], n_targets: int) -> list[Group]:
    """Cut targets into groups, prompt by prompt."""
    return [
        Group(prompt, first, min(first + size, n_targets))
        for prompt in prompts
        for size in (group_size(work, len(prompt.ids)),)
        for first in range(0, n_targets, size)
    ]


class States:
    """The state of one prompt at a time, made when a group of it is first wanted."""

    def __init__(
        self,
        work: Workspace,
        targets: Sequence[Target],
        *,
        dictionaries: DictionarySet | None = None,
    ) -> None:
        self._work = work
        self._targets = tuple(targets)
        self._dictionaries = dictionaries
        self._held: PromptState | None = None
        self.bytes_read = 0

    def of(self, group: Group) -> PromptState:
        """Return the prompt's state with the group's targets alone.

        Raises:
            PromptError: the model's ids of the prompt are not those that were sampled.
        """
        if self._held is None or self._held.prompt_id != group.prompt.id:
            self._held = None  # let go of the last prompt before the next is run
            self._held = self._make(group.prompt)
        return replace(self._held, targets=self._held.targets[group.first : group.stop])

    def _make(self, prompt: SampledPrompt) -> PromptState:
        work = self._work
        batch = work.model.tokenize(Prompt(prompt.text, format="raw"))
        if tuple(batch.ids[0].tolist()) != prompt.ids:
            raise PromptError(
                f"prompt '{prompt.id}' has other tokens than were sampled: the tokenizer changed; "
                "run `layerscope pathways select` again"
            )
        state = PromptState.of(
            work.model,
            batch,
            self._dictionaries or work.dictionaries,
            self._targets,
            prompt_id=prompt.id,
            keep_reads=work.config.error == "frozen",
            other_model=work.config.allow_mismatch,
        )
        self.bytes_read += state.bytes_read
        return state


def discover_options(work: Workspace, **changes: Any) -> DiscoverOptions:
    """Return what counts as an edge, from the configuration."""
    config = work.config
    given: dict[str, Any] = {
        "variant": config.variant,
        "error": config.error,
        "positions": config.positions,
        "order": config.order,
        "top_k": config.top_k_pathways,
        "min_share": config.min_share,
        "min_gradient": config.gradient_threshold,
    }
    return DiscoverOptions(**{**given, **changes})


def replay_options(work: Workspace) -> ReplayOptions:
    """Return what is replayed, from the configuration."""
    config = work.config
    return ReplayOptions(doses=config.doses, nulls=config.nulls, seed=config.seed)


def thresholds_of(state: PromptState) -> dict[tuple[int, int], float | None]:
    """Return the gate's threshold of every target, None where it depends on other features."""
    return {
        (t.target.feature.layer, t.target.feature.feature_id): (
            None if t.margin is None else t.pre_activation - t.margin
        )
        for t in state.targets
    }
