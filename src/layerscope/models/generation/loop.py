"""The generation loop: read the prompts once, then one token per row and pass."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerscope.errors import CapabilityError, ConfigError, PromptError
from layerscope.models.backends.base import Cache, Capability
from layerscope.models.batches import TokenBatch
from layerscope.models.edits import Edit
from layerscope.models.generation.prefix import shared_prefix
from layerscope.models.generation.result import FinishReason, Generation, Piece, Stream
from layerscope.models.generation.sampling import Sampler, Sampling
from layerscope.models.generation.steps import EditsByStep
from layerscope.models.generation.text import Detokeniser, StopStrings, decode
from layerscope.models.run import Capture, RunResult
from layerscope.models.sites import Site, expand

if TYPE_CHECKING:
    from layerscope.models.language_model import LanguageModel
    from layerscope.models.prompts import PromptsLike


@dataclass(frozen=True)
class Settings:
    """How long to generate, how to choose tokens, and where to stop."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if "" in self.stop:
            raise ConfigError("a stop string is empty, so nothing could be generated: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        account = asdict(self)
        return {**account.pop("sampling"), **account}


@dataclass
class _Row:
    """One row as it grows."""

    detokeniser: Detokeniser
    stops: StopStrings
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    texts: list[str] = field(default_factory=list[str])
    finish: FinishReason | None = None

    def push(self, token: int, logprob: float, settings: Settings) -> str:
        """Take one more token; return the text that can be shown."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        text = self.stops.push(self.detokeniser.push(token))
        if token in settings.eos_ids:
            self.finish = "eos"
        elif self.stops.stopped or token in settings.stop_ids:
            self.finish = "stop"
        elif len(self.ids) == settings.max_new_tokens:
            self.finish = "length"
        if self.finish and not self.stops.stopped:
            text += self.stops.push(self.detokeniser.finish())
            text += self.stops.finish()
        self.texts.append(text)
        return text


def start(
    model: LanguageModel,
    prompts: PromptsLike,
    settings: Settings,
    *,
    edits: Sequence[Edit] = (),
    capture: Capture | str | Site | Sequence[str | Site] = (),
    keep_logits: bool = False,
    share_prompts: bool = False,
) -> Stream:
    """Check everything, and return the tokens as they will be generated."""
    if Capability.CACHE not in model.backend.capabilities:
        raise CapabilityError(
            f"{model.family} on the {model.backend.name} backend has no key-value cache, which "
            "generation needs; use another backend, or run() on growing sequences"
        )
    batch = model.tokenize(prompts, padding_side="left")
    longest = max(batch.lengths) + settings.max_new_tokens
    if model.n_ctx is not None and longest > model.n_ctx:
        row = batch.lengths.index(max(batch.lengths))
        raise PromptError(
            f"prompt {row} has {batch.lengths[row]} tokens, and {settings.max_new_tokens} new ones "
            f"go {longest - model.n_ctx} beyond the model's context of {model.n_ctx}: shorten the "
            "prompt or max_new_tokens"
        )
    loop = _Loop(model, batch, settings, tuple(edits), capture, keep_logits, share_prompts)
    return Stream(loop.run())


class _Loop:
    def __init__(
        self,
        model: LanguageModel,
        batch: TokenBatch,
        settings: Settings,
        edits: tuple[Edit, ...],
        capture: Capture | str | Site | Sequence[str | Site],
        keep_logits: bool,
        share_prompts: bool,
    ) -> None:
        self._model = model
        self._batch = batch
        self._settings = settings
        self._edits = edits
        self._capture = _checked_capture(model, capture)
        self._keep_logits = keep_logits
        self._share_prompts = share_prompts
        longest = max(batch.lengths) + settings.max_new_tokens
        self._by_step = EditsByStep(model.backend, batch, edits, longest)
        self._prompt_ids = tuple(batch.row_ids(row) for row in range(len(batch)))
        self._rows = [
            _Row(Detokeniser(model.tokenizer, ids), StopStrings(settings.stop))
            for ids in self._prompt_ids
        ]
        self._one_each = TokenBatch.from_ids([[0]] * len(batch))
        self._captured: dict[Site, list[Tensor]] = {}
        self._logits: list[Tensor] = []

    def run(self) -> Generator[Piece, None, Generation]:
        """Generate; the activations of a token are captured when it is read."""
        sampler = Sampler(self._settings.sampling, self._prompt_ids)
        result = self._read_prompts()
        for step in range(self._settings.max_new_tokens):
            logits = self._next_logits(result)
            if self._keep_logits:
                self._logits.append(logits)
            chosen, logprobs = sampler.choose(logits)
            for index, row in enumerate(self._rows):
                if row.finish is None:
                    text = row.push(chosen[index], logprobs[index], self._settings)
                    yield Piece(index, step, chosen[index], text, logprobs[index], row.finish)
            running = any(row.finish is None for row in self._rows)
            if running or self._capture is not None:
                # A finished row goes on unseen: what it reads is its own last token.
                # As a batch: a generated token may be the padding id.
                assert result.cache is not None
                ids = torch.tensor([[row.ids[-1]] for row in self._rows])
                batch = self._one_each.with_ids(ids)
                edits = self._by_step.of_step(batch, result.cache.mask)
                result = self._pass(batch, edits, result.cache, last=not running, capture=True)
            if not running:
                break
        return self._finished()

    def _read_prompts(self) -> RunResult:
        """Run the prompts; the beginnings that rows share only once, where that was asked for."""
        if self._share_prompts:
            prefix = shared_prefix(self._model, self._batch, self._edits)
            if prefix is not None:
                edits = self._by_step.of_rest(prefix.rest, prefix.cache.mask)
                return self._pass(prefix.rest, edits, prefix.cache)
        return self._pass(self._batch, self._by_step.of_prompt())

    def _pass(
        self,
        batch: TokenBatch,
        edits: list[Edit],
        cache: Cache | None = None,
        *,
        last: bool = False,
        capture: bool = False,
    ) -> RunResult:
        """Run the prompts, or one token per row after what came before."""
        wanted = self._capture if capture and self._capture is not None else ()
        logits = "all" if self._by_step.needs_all_logits else None if last else "last"
        result = self._model.run(
            batch,
            edits=edits,
            capture=wanted,
            cache=cache,
            keep_cache=not last,
            logits=logits,
        )
        for site in result:
            self._captured.setdefault(site, []).append(result[site])
        return result

    def _next_logits(self, result: RunResult) -> Tensor:
        assert result.logits is not None
        if not self._by_step.needs_all_logits:
            return result.logits[:, -1]
        batch = result.batch
        columns = torch.tensor([batch.column(row, -1) for row in range(len(batch))])
        return result.logits[torch.arange(len(batch)), columns.to(result.logits.device)]

    def _finished(self) -> Generation:
        model, rows = self._model, self._rows
        counts = torch.tensor([len(row.ids) for row in rows])
        reasons: list[FinishReason] = [row.finish or "length" for row in rows]
        return Generation(
            prompt_ids=self._prompt_ids,
            ids=tuple(tuple(row.ids) for row in rows),
            prompts=tuple(decode(model.tokenizer, ids) for ids in self._prompt_ids),
            texts=tuple("".join(row.texts) for row in rows),
            finish=tuple(reasons),
            logprobs=tuple(tuple(row.logprobs) for row in rows),
            steps=torch.arange(int(counts.max()))[None, :] < counts[:, None],
            activations={site: torch.cat(parts, 1) for site, parts in self._captured.items()},
            logits=torch.stack(self._logits, dim=1) if self._keep_logits else None,
            settings=self._settings.to_dict(),
            edits=tuple(edit.describe() for edit in self._edits),
            info=model.backend.info,
        )


def _checked_capture(
    model: LanguageModel, capture: Capture | str | Site | Sequence[str | Site]
) -> Capture | None:
    """Return what to capture of every generated token, None for nothing.

    Raises:
        ConfigError: it names positions, or what has another size in every pass.
    """
    wanted = capture if isinstance(capture, Capture) else Capture(capture)
    if wanted.positions is not None:
        raise ConfigError(
            "a generation captures at every generated token: leave out the positions, and select "
            "steps of the result"
        )
    if not isinstance(wanted.sites, str | Site) and not list(wanted.sites):
        return None
    info = model.backend.info
    sites = expand(
        wanted.sites,
        n_layers=info.n_layers,
        n_heads=info.n_heads,
        n_kv_heads=info.n_kv_heads,
        available=lambda site: model.backend.why_not(site) is None,
    )
    for site in sites:
        reason = model.backend.why_not(site)
        if reason is not None:
            raise CapabilityError(reason)
        if site.kind in ("attn.scores", "attn.pattern", "logits"):
            raise ConfigError(
                f"'{site}' is not captured while generating: "
                + ("use keep_logits=True" if site.kind == "logits" else "it grows with every token")
                + "; or run() the finished sequences"
            )
    return wanted


def end_ids(model: LanguageModel) -> tuple[int, ...]:
    """Return the ids that end a sequence, of the tokenizer and of the model's own settings."""
    given: list[Any] = [model.tokenizer.eos_token_id, *getattr(model.backend, "end_ids", ())]
    return tuple(dict.fromkeys(id_ for id_ in given if isinstance(id_, int)))
