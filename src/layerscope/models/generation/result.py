"""What a generation gives: pieces as they come, and the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.errors import SiteError, nearest
from layerscope.models.batches import PaddingSide, TokenBatch
from layerscope.models.sites import Site

if TYPE_CHECKING:
    from collections.abc import Generator

    from layerscope.models.backends.base import ModelInfo

FinishReason: TypeAlias = Literal["eos", "stop", "length"]
"""An end-of-sequence token; a stop string or stop id; max_new_tokens."""


@dataclass(frozen=True)
class Piece:
    """One generated token of one row.

    Attributes:
        row: of the batch.
        step: which generated token of the row, from 0.
        token: its id.
        text: what can now be shown. It may be empty while a character is incomplete or a stop
            string may have begun, and the pieces of a row add up to its text.
        logprob: log-probability of the token in nats.
        finish: why the row ends with this token, or None.
    """

    row: int
    step: int
    token: int
    text: str
    logprob: float
    finish: FinishReason | None


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for every row.

    Attributes:
        prompt_ids: ids of each prompt, without padding.
        ids: generated ids of each row, with the one that ended it (EOS, or the last of a stop
            string).
        prompts: text of each prompt, without special tokens.
        texts: text of each continuation, without special tokens and cut before a stop string.
        finish: why each row ended.
        logprobs: log-probability in nats of each generated id, under the model's own distribution
            (with edits; before temperature, top_k and top_p).
        steps: [row, step], True where a row has a token at that step.
        activations: by site, [row, step, ...]: what was captured while each generated token was
            read. Meaningless where `steps` is False.
        logits: [row, step, vocab] that each token was chosen from, where they were to be kept.
        settings: how tokens were chosen.
        edits: account of every edit.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    ids: tuple[tuple[int, ...], ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    finish: tuple[FinishReason, ...]
    logprobs: tuple[tuple[float, ...], ...]
    steps: Bool[Tensor, "row step"]
    activations: Mapping[Site, Tensor]
    logits: Float[Tensor, "row step vocab"] | None
    settings: Mapping[str, Any]
    edits: tuple[Mapping[str, Any], ...]
    info: ModelInfo | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def full_texts(self) -> tuple[str, ...]:
        """Prompt and continuation of each row."""
        return tuple(a + b for a, b in zip(self.prompts, self.texts, strict=True))

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Ids of prompt and continuation of each row."""
        return tuple(a + b for a, b in zip(self.prompt_ids, self.ids, strict=True))

    def batch(self, padding_side: PaddingSide = "right") -> TokenBatch:
        """Return prompts and continuations as a batch that `LanguageModel.run` takes."""
        return TokenBatch.from_ids(self.sequences, padding_side=padding_side)

    def __getitem__(self, name: str | Site) -> Tensor:
        """Return the activations of one site by name; negative layers count from the last."""
        site = Site.parse(name)
        if self.info is not None:
            site = site.resolve(self.info.n_layers, self.info.n_heads, self.info.n_kv_heads)
        if site not in self.activations:
            captured = [str(known) for known in self.activations]
            raise SiteError(
                f"'{name}' was not captured{nearest(str(site), captured)}; captured: "
                f"{', '.join(captured) or 'nothing'}"
            )
        return self.activations[site]

    def provenance(self) -> dict[str, Any]:
        """Return how this came about, ready for JSON; the model has its own account."""
        return {"settings": dict(self.settings), "edits": [dict(edit) for edit in self.edits]}


class Stream:
    """Pieces as they are generated; the whole once they have all been taken."""

    def __init__(self, pieces: Generator[Piece, None, Generation]) -> None:
        self._pieces = pieces
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[Piece]:
        while self._result is None:
            try:  # not `yield from`: whoever stops listening may go on later
                piece = next(self._pieces)
            except StopIteration as end:
                self._result = end.value
                return
            yield piece

    @property
    def result(self) -> Generation:
        """The whole; generates what has not been taken yet."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result
