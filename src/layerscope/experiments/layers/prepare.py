"""From passes to token sequences: answers aligned, batches cut, all checks made before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from layerscope.errors import PromptError
from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.prompts import Pass
from layerscope.measures.table import SCHEMA_VERSION
from layerscope.models import LanguageModel
from layerscope.models.answers import AnswerAlignment, align_answer
from layerscope.models.batches import RowOffsets, Span
from layerscope.models.chat import Format
from layerscope.models.prompt import Rendered, prompt_sha256, render
from layerscope.models.prompts import encode_plain
from layerscope.models.templates import TaskTemplate, get_template
from layerscope.models.vocabulary import is_ignorable

BYTES_PER_VALUE = 4  # residuals are decoded in float32
COPIES = 3  # captured, gathered, transformed: what of one batch's residuals is alive at once


@dataclass(frozen=True)
class PreparedPass:
    """A pass whose answer is aligned with its tokens.

    `sequence` is what goes through the model: special tokens, prompt, and all answer tokens but the
    last, so that later answer tokens are scored given the earlier ones. Causality leaves
    everything up to `length`, the end of the prompt, as if the answer were not there.
    `prompt_ids` are the tokens of what was asked: of a chat, those of its messages.
    """

    source: Pass
    rendered: Rendered
    prompt_sha256: str
    alignment: AnswerAlignment
    prompt_ids: tuple[int, ...]
    sequence: tuple[int, ...]
    length: int
    foil_id: int | None
    echo_ids: tuple[int, ...]  # tokens of the prompt that carry meaning, each once


@dataclass(frozen=True)
class WorkUnit:
    """Passes that go through the model as one padded batch, under a key of their content."""

    key: str
    passes: tuple[PreparedPass, ...]


def chosen_format(model: LanguageModel, config: LayersConfig) -> Format:
    """Return the format of the prompts: the configured one, or with `auto` the model's default."""
    return model.tuning.default_format if config.format == "auto" else config.format


def prepare(
    model: LanguageModel,
    passes: Sequence[Pass],
    config: LayersConfig,
    *,
    strings: Sequence[str] | None = None,
) -> list[PreparedPass]:
    """Render and tokenise every prompt and align its answer; raises PromptError naming it.

    `strings` are the model's token strings, for callers that prepare passes one by one.
    """
    found: list[PreparedPass] = []
    for source, item in zip(
        passes, try_prepare(model, passes, config, strings=strings), strict=True
    ):
        if isinstance(item, PromptError):
            raise named(source, item)
        found.append(item)
    return found


def try_prepare(
    model: LanguageModel,
    passes: Sequence[Pass],
    config: LayersConfig,
    *,
    strings: Sequence[str] | None = None,
) -> Iterator[PreparedPass | PromptError]:
    """Prepare passes one by one; one that cannot be asked yields the error that says why."""
    template = get_template(config.task, family=model.family)
    strings = model.token_strings() if strings is None else strings
    for source in passes:
        try:
            found = _prepare_one(model, source, template, config, strings)
        except PromptError as error:
            yield error
        else:
            yield found


def named(source: Pass, error: PromptError) -> PromptError:
    """Return an error of the same class that names its prompt."""
    name = source.fact_key or "the control"
    return type(error)(f"prompt {name!r} ({source.variant}): {error}")


def _prepare_one(
    model: LanguageModel,
    source: Pass,
    template: TaskTemplate,
    config: LayersConfig,
    strings: Sequence[str],
) -> PreparedPass:
    format_ = chosen_format(model, config)
    prompt = template.prompt(source.text, format=format_, system=config.system)
    prompt = replace(prompt, key=source.fact_key or "control")
    rendered = render(model.tokenizer, prompt, tuning=model.tuning)
    joint = source.joint
    alignment = align_answer(model.tokenizer, rendered.text, source.answer, variant=joint)
    foil_id = None
    if source.foil is not None:
        foil_id = align_answer(model.tokenizer, rendered.text, source.foil, variant=joint).first_id
    batch = model.tokenize([prompt])
    start = batch.row_ids(0)
    prompt_ids = _written_ids(model, rendered, start, batch.offsets[0])
    sequence = (*start, *alignment.ids[:-1])
    if model.n_ctx is not None and len(sequence) > model.n_ctx:
        raise PromptError(
            f"{len(sequence)} tokens with its answer, but {model.name} reads at most "
            f"{model.n_ctx}; shorten the prompt"
        )
    echo = tuple(dict.fromkeys(token for token in prompt_ids if not is_ignorable(strings[token])))
    return PreparedPass(
        source=source,
        rendered=rendered,
        prompt_sha256=prompt_sha256(start, rendered),
        alignment=alignment,
        prompt_ids=prompt_ids,
        sequence=tuple(int(token) for token in sequence),
        length=len(start),
        foil_id=foil_id,
        echo_ids=echo,
    )


def _written_ids(
    model: LanguageModel, rendered: Rendered, ids: Sequence[int], offsets: RowOffsets | None
) -> tuple[int, ...]:
    """Return the tokens of what the user wrote, without what a chat template adds."""
    plain, _ = encode_plain(model.tokenizer, rendered.text)
    if rendered.format == "raw":
        return plain
    if rendered.parts is None or offsets is None:
        special = set(model.tokenizer.all_special_ids)
        return tuple(id_ for id_ in plain if id_ not in special)
    return tuple(
        id_ for id_, span in zip(ids, offsets, strict=True) if _inside(span, rendered.parts)
    )


def _inside(span: Span | None, parts: Sequence[Span]) -> bool:
    return span is not None and any(span[0] < end and start < span[1] for start, end in parts)


def work_units(
    prepared: Sequence[PreparedPass],
    config: LayersConfig,
    *,
    n_layers: int,
    d_model: int,
    identity: Mapping[str, Any],
) -> list[WorkUnit]:
    """Cut passes into padded batches that respect the configuration's memory and pass limits.

    The cut depends on the passes, the configuration and the model only, so a run that is started
    again finds the units it finished before. `identity` is what else decides the bytes of a
    result: the model's weights, dtype, device and the versions of the software.
    """
    per_token = (n_layers + 1) * d_model * BYTES_PER_VALUE * COPIES
    groups: list[list[PreparedPass]] = []
    longest = 0
    for item in prepared:
        widest = max(longest, len(item.sequence))
        group = groups[-1] if groups else []
        full = len(group) >= config.passes_per_batch
        if not groups or full or widest * (len(group) + 1) * per_token > config.batch_bytes:
            groups.append([item])
            longest = len(item.sequence)
        else:
            group.append(item)
            longest = widest
    return [WorkUnit(_key(group, config, identity), tuple(group)) for group in groups]


def _key(group: Sequence[PreparedPass], config: LayersConfig, identity: Mapping[str, Any]) -> str:
    content = {
        "schema": SCHEMA_VERSION,
        "identity": dict(identity),
        "config": config.content(),
        "passes": [[asdict(item.source), item.prompt_sha256] for item in group],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
