"""One padded batch, from residuals to typed rows: lenses applied, readout taken, nothing kept.

Peak memory: the batch's residuals of all layers three times over (`LayersConfig.batch_bytes`) plus
the readout's tiles (`readout_bytes`) plus [prompts, vocabulary] logits of the true head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.experiments.layers import rows
from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.lenses import Lens, get_lens
from layerscope.lenses.fitting.temperature import TemperatureFit, fit_on_prompts
from layerscope.measures.table import JACCARD_K, LastRowInfo, PromptInfo
from layerscope.models import Capture, LanguageModel, TokenBatch
from layerscope.models.vocabulary import is_ignorable
from layerscope.readout import Readout, Reference, Request, TokenSets, fit_temperature, readout

NO_TOKEN = -1
LEAN = Request(
    entropy=False,
    top_k=0,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)


@dataclass(frozen=True)
class Residuals:
    """Residuals of one batch at chosen places, and whose they are.

    `owner[i]` is the number of the pass in the batch, `position[i]` the position in its unpadded
    sequence; positions from the prompt's end on belong to the answer's later tokens.
    """

    states: Float[Tensor, "place row d_model"]
    owner: Int[np.ndarray, " place"]
    position: Int[np.ndarray, " place"]

    def select(self, mask: np.ndarray) -> Residuals:
        """Return the places where `mask` holds."""
        keep = torch.from_numpy(np.flatnonzero(mask)).to(self.states.device)
        return Residuals(self.states[keep], self.owner[mask], self.position[mask])


class BatchDecoder:
    """Decodes batches of one model with one configuration."""

    def __init__(self, model: LanguageModel, lenses: Sequence[Lens], config: LayersConfig) -> None:
        self.model = model
        self.lenses = {lens.name: lens for lens in lenses}
        self.config = config
        self.strings = model.token_strings()
        self.n_rows = model.n_layers + 1
        # The norm lens with one temperature per row; its figures stand on that lens's rows.
        self.tempered: Lens | None = None

    def decode(self, passes: Sequence[PreparedPass]) -> tuple[pl.DataFrame, list[PromptInfo]]:
        """Run one padded batch and return its rows and what is known of its prompts."""
        residuals, head_logits = self._forward(passes)
        ends = np.array([item.length - 1 for item in passes])[residuals.owner]
        last = residuals.select(residuals.position == ends)
        before = residuals.select(residuals.position < ends)
        tail = residuals.select(residuals.position > ends)
        hidden = {name: self._transform(lens, last) for name, lens in self.lenses.items()}
        frames: list[pl.DataFrame] = []
        last_rows: list[list[LastRowInfo]] = [[] for _ in passes]
        for name, lens in self.lenses.items():
            against = hidden["raw"] if name == "norm" and "raw" in hidden else None
            result = self._read_last(hidden[name], head_logits, passes, against)
            columns = self._identity(lens, last, passes)
            columns |= rows.every_position(
                result, head_top1=rows.HEAD_TOP1, strings=self.strings, states=last.states
            )
            columns |= rows.last_position(result, passes, self.n_rows)
            columns |= rows.norm_effect(last.states, hidden[name])
            if name == "norm" and self.tempered is not None:
                columns |= self._tempered(self.tempered, last, head_logits)
            columns["cos_to_final"] = self._cosine(hidden[name], last)
            columns["answer_full_log2p"] = self._full_answer(lens, tail, result, passes)
            columns["top1_ignorable"] = self._ignorable(result)
            frames.append(rows.frame(columns))
            if before.owner.size:
                frames.append(self._read_before(lens, before, passes))
            for number, info in enumerate(self._last_rows(name, hidden[name], result, head_logits)):
                last_rows[number].append(info)
        infos = [
            rows.prompt_info(item, head_logits[number], self.strings, last_rows[number])
            for number, item in enumerate(passes)
        ]
        return pl.concat(frames, how="diagonal_relaxed"), infos

    def fit_temperatures(self, passes: Sequence[PreparedPass]) -> TemperatureFit:
        """Fit one temperature per row below the last to the last positions of a few passes."""
        residuals, head_logits = self._forward(passes)
        ends = np.array([item.length - 1 for item in passes])[residuals.owner]
        last = residuals.select(residuals.position == ends)
        hidden = self._transform(get_lens("norm", self.model, norm=self.config.norm_choice), last)
        return fit_on_prompts(hidden[:, :-1].transpose(0, 1), head_logits, self.model.unembedding)

    def _forward(
        self, passes: Sequence[PreparedPass]
    ) -> tuple[Residuals, Float[Tensor, "pass vocab"]]:
        """Run the model once; residuals of every row at every real position, and head logits."""
        batch = TokenBatch.from_ids([item.sequence for item in passes], padding_side="right")
        sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(self.n_rows - 1))]
        result = self.model.run(
            batch,
            # Blocks may lie on several devices; the readout is where the head is.
            capture=Capture(sites, device=self.model.unembedding.weight.device),
            logits=[[item.length - 1] for item in passes],
            products=self.config.run_products,
        )
        owner = np.repeat(np.arange(len(passes)), [len(item.sequence) for item in passes])
        position = np.concatenate([np.arange(len(item.sequence)) for item in passes])
        # Padded on the right, so a position of the unpadded sequence is its own column.
        places = (torch.from_numpy(owner), torch.from_numpy(position))
        states = torch.stack([result[site][places] for site in sites], dim=1)
        assert result.logits is not None
        return Residuals(states, owner, position), result.logits[:, 0].float()

    def _transform(self, lens: Lens, residuals: Residuals) -> Float[Tensor, "place row d_model"]:
        """Return what the lens unembeds, for every place and row."""
        states = residuals.states
        return torch.stack(
            [lens.transform(states[:, row], row) for row in range(self.n_rows)], dim=1
        )

    def _readout(
        self,
        hidden: Float[Tensor, "place row d_model"],
        request: Request,
        *,
        reference: Reference | None = None,
        against: Float[Tensor, "place row d_model"] | None = None,
        tokens: Int[Tensor, "place n_tok"] | None = None,
        sets: TokenSets | None = None,
    ) -> Readout:
        repeats = hidden.shape[1]
        return readout(
            hidden.flatten(0, 1),
            self.model.unembedding,
            request=request,
            reference=reference,
            against=None if against is None else against.flatten(0, 1),
            tokens=None if tokens is None else tokens.repeat_interleave(repeats, 0),
            token_sets=sets,
            products=self.config.products,
            budget_bytes=self.config.readout_bytes,
        )

    def _read_last(
        self,
        hidden: Float[Tensor, "pass row d_model"],
        head_logits: Float[Tensor, "pass vocab"],
        passes: Sequence[PreparedPass],
        against: Float[Tensor, "pass row d_model"] | None,
    ) -> Readout:
        """Read everything at the last positions; the reference is the model's true head."""
        index = torch.arange(len(passes)).repeat_interleave(self.n_rows)
        wanted = [
            [item.alignment.first_id, NO_TOKEN if item.foil_id is None else item.foil_id, top]
            for item, top in zip(passes, head_logits.argmax(-1).tolist(), strict=True)
        ]
        return self._readout(
            hidden,
            Request(top_k=self.config.top_k, overlap_k=JACCARD_K, cosine=False),
            reference=Reference(index=index, logits=head_logits),
            against=against,
            tokens=torch.tensor(wanted),
            sets=TokenSets.of([item.echo_ids for item in passes], index[:, None]),
        )

    def _tempered(
        self, lens: Lens, last: Residuals, head_logits: Float[Tensor, "pass vocab"]
    ) -> rows.Columns:
        """Return divergences of the norm lens under one temperature per row, both ways, bits."""
        index = torch.arange(len(head_logits)).repeat_interleave(self.n_rows)
        result = self._readout(
            self._transform(lens, last),
            replace(LEAN, kl_to_reference=True, kl_from_reference=True),
            reference=Reference(index=index, logits=head_logits),
        )
        assert result.reference is not None
        return {
            "kl_to_final_bits_norm_temp": result.reference.kl_to_bits,
            "kl_from_final_bits_norm_temp": result.reference.kl_from_bits,
        }

    def _cosine(
        self, hidden: Float[Tensor, "pass row d_model"], last: Residuals
    ) -> Float[Tensor, " pass_row"]:
        """Return cosines of bias-free logits with the model's, before scale and softcap.

        A head's scale and softcap cannot be undone on its logits, so the reference is the hidden
        vector that the head unembeds.
        """
        index = torch.arange(hidden.shape[0]).repeat_interleave(self.n_rows)
        result = self._readout(
            hidden,
            replace(LEAN, cosine=True),
            reference=Reference(index=index, hidden=self._final(last)),
        )
        assert result.reference is not None and result.reference.cosine is not None
        return result.reference.cosine

    def _final(self, places: Residuals) -> Float[Tensor, "place d_model"]:
        """Return what the head unembeds: the last row under the final norm."""
        _, final_norm = self.model.norm_at(self.n_rows - 1, "final")
        return final_norm(places.states[:, -1])

    def _read_before(
        self, lens: Lens, places: Residuals, passes: Sequence[PreparedPass]
    ) -> pl.DataFrame:
        """Read the positions before the last, against the last row under the final norm."""
        final = self._final(places)
        top1 = self._readout(final[:, None], replace(LEAN, top_k=1)).top_ids
        assert top1 is not None
        index = torch.arange(final.shape[0]).repeat_interleave(self.n_rows)
        result = self._readout(
            self._transform(lens, places),
            replace(
                LEAN,
                entropy=True,
                top_k=self.config.top_k,
                gap=True,
                kl_to_reference=True,
                extremes=True,
            ),
            reference=Reference(index=index, hidden=final),
            tokens=top1[:, :1],
        )
        columns = self._identity(lens, places, passes)
        columns |= rows.every_position(
            result, head_top1=0, strings=self.strings, states=places.states
        )
        return rows.frame(columns)

    def _full_answer(
        self, lens: Lens, tail: Residuals, result: Readout, passes: Sequence[PreparedPass]
    ) -> Float[Tensor, " place_row"]:
        """Return log2 p of the whole answer per row: its first token, then the rest given it."""
        assert result.token_log2p is not None
        total = result.token_log2p[:, rows.ANSWER].double().view(len(passes), self.n_rows).clone()
        if tail.owner.size:
            wanted = [
                passes[owner].alignment.ids[position - passes[owner].length + 1]
                for owner, position in zip(tail.owner, tail.position, strict=True)
            ]
            later = self._readout(
                self._transform(lens, tail), LEAN, tokens=torch.tensor(wanted)[:, None]
            )
            assert later.token_log2p is not None
            steps = later.token_log2p[:, 0].double().view(-1, self.n_rows)
            total.index_add_(0, torch.from_numpy(tail.owner), steps)
        return total.flatten()

    def _ignorable(self, result: Readout) -> list[bool | None]:
        assert result.top_ids is not None
        return [
            is_ignorable(self.strings[token]) if token >= 0 else None
            for token in result.top_ids[:, 0].tolist()
        ]

    def _identity(
        self, lens: Lens, places: Residuals, passes: Sequence[PreparedPass]
    ) -> rows.Columns:
        """Return the columns that say which row this is."""
        sources = [passes[owner].source for owner in places.owner]
        tokens = [
            self.strings[passes[owner].sequence[position]]
            for owner, position in zip(places.owner, places.position, strict=True)
        ]
        ends = [
            passes[owner].length - 1 == position
            for owner, position in zip(places.owner, places.position, strict=True)
        ]
        modules = [lens.norm_module(row) for row in range(self.n_rows)]
        per_place = {
            "prompt_index": [source.index for source in sources],
            "fact_key": [source.fact_key for source in sources],
            "fact_index": [source.fact_index for source in sources],
            "prompt_id": [source.prompt_id for source in sources],
            "prompt_variant": [source.variant for source in sources],
            "pos": places.position.tolist(),
            "is_last": ends,
            "token": tokens,
        }
        count = len(sources)
        columns: rows.Columns = {
            name: [value for value in values for _ in range(self.n_rows)]
            for name, values in per_place.items()
        }
        columns["lens"] = [lens.name] * (count * self.n_rows)
        columns["layer"] = list(range(self.n_rows)) * count
        columns["norm_choice"] = [lens.norm_choice] * (count * self.n_rows)
        columns["norm_module"] = modules * count
        return columns

    def _last_rows(
        self,
        name: str,
        hidden: Float[Tensor, "pass row d_model"],
        result: Readout,
        head_logits: Float[Tensor, "pass vocab"],
    ) -> list[LastRowInfo]:
        """Compare the last row of a lens with the model's head, pass by pass."""
        final = self.model.unembedding.logits(hidden[:, -1])
        fits = fit_temperature(final, head_logits)
        at = slice(self.n_rows - 1, None, self.n_rows)
        assert result.reference is not None and result.reference.kl_to_bits is not None
        assert result.top_ids is not None and result.top_log2p is not None
        assert result.token_log2p is not None and result.token_rank is not None
        head_top = head_logits.softmax(-1).max(-1)
        found: list[LastRowInfo] = []
        for number in range(hidden.shape[0]):
            if bool(result.nonfinite[at][number]):
                found.append(LastRowInfo(name, *([None] * 8)))
                continue
            found.append(
                LastRowInfo(
                    lens=name,
                    kl_to_final_bits=rows.number(result.reference.kl_to_bits[at][number]),
                    top1_agree=int(result.top_ids[at][number, 0]) == int(head_top.indices[number]),
                    p_top1_lens=rows.number(result.top_log2p[at][number, 0].exp2()),
                    p_top1_model=rows.number(head_top.values[number]),
                    p_answer_lens=rows.number(result.token_log2p[at][number, rows.ANSWER].exp2()),
                    answer_rank_lens=int(result.token_rank[at][number, rows.ANSWER]),
                    temp_est=rows.number(fits.temp_est[number]),
                    kl_after_temp_bits=rows.number(fits.kl_after_temp_bits[number]),
                )
            )
        return found
