"""One padded batch of questions, read at the last position of each prompt through every lens.

Nothing of size [question, row, vocabulary] exists: residuals are kept at one position per prompt,
and the readout works in tiles (`BatteryConfig.readout_bytes`). The logits of the model's own head
are [question, vocabulary] for one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.battery.config import BatteryConfig
from layerscope.experiments.battery.prepare import Asked, Control
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.lenses import Lens
from layerscope.measures.table import ROW_SCHEMA, conform
from layerscope.models import Capture, LanguageModel, TokenBatch
from layerscope.models.vocabulary import is_ignorable
from layerscope.readout import Readout, Reference, Request, readout
from layerscope.readout.fused import FROM_LOGITS, Kernels, describe

ANSWER, FOIL = 0, 1  # columns of the tokens asked for
NO_TOKEN = -1
TOP = 2  # the echo detectors look at the most likely token and the runner-up
REQUEST = Request(
    entropy=True,
    top_k=TOP,
    gap=True,
    kl_to_reference=True,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)

FOIL_RANK = "foil_rank"
WHOLE_LOGITS = 16 * FROM_LOGITS  # from here on compiled passes save more than loading them takes


def kernels_for(n_prompts: int, model: LanguageModel, *, n_lenses: int) -> Kernels:
    """Return the passes of the readout: one choice for a whole battery, not one for each batch.

    A batch is too small to wait for compiled passes; many batches are not.
    """
    logits = n_prompts * (model.n_layers + 1) * n_lenses * model.d_vocab
    ready = describe()["numba"] is not None and model.unembedding.weight.device.type == "cpu"
    return "fused" if ready and logits >= WHOLE_LOGITS else "plain"


class LastReader:
    """Reads prompts at their last position, with the lenses of one run."""

    def __init__(
        self,
        model: LanguageModel,
        lenses: Sequence[Lens],
        config: BatteryConfig,
        *,
        kernels: Kernels = "auto",
    ) -> None:
        self.model, self.config = model, config
        self.kernels: Kernels = kernels
        self.lenses = {lens.name: lens for lens in lenses}
        self.strings = model.token_strings()
        self.n_rows = model.n_layers + 1

    def read(self, asked: Sequence[Asked]) -> tuple[pl.DataFrame, list[dict[str, float | int]]]:
        """Run one batch; return typed rows (see `measures.table`) and the head's own figures.

        `prompt_index` of a row is the question's number; an extra column holds the foil's rank.
        """
        passes = [entry.prepared for entry in asked]
        states, logits = self._forward(passes)
        golds = torch.tensor([_first(item) for item in passes])
        foils = torch.tensor([NO_TOKEN if i.foil_id is None else i.foil_id for i in passes])
        tokens = torch.stack([golds, foils], 1)
        hidden = {name: self._transform(lens, states) for name, lens in self.lenses.items()}
        frames = [
            self._frame(
                name,
                self._read(vectors, logits, tokens, hidden.get("raw") if name == "norm" else None),
                asked,
                golds,
            )
            for name, vectors in hidden.items()
        ]
        return pl.concat(frames), _head(logits, golds)

    def control(self, control: Control) -> pl.DataFrame:
        """Return, per item, lens and row, the control answer's probability and the item's own."""
        states, _ = self._forward([control.prepared])
        ids = torch.tensor([token for _, token in control.items])
        gold = _first(control.prepared)
        keys = [key for key, _ in control.items]
        frames: list[pl.DataFrame] = []
        for name, lens in self.lenses.items():
            logits = self.model.unembedding.logits(self._transform(lens, states)[0])
            log_p = logits.double().log_softmax(-1).cpu()
            layers = torch.arange(self.n_rows).repeat_interleave(len(keys))
            frames.append(
                pl.DataFrame(
                    {
                        "item": keys * self.n_rows,
                        "lens": [name] * len(layers),
                        "layer": layers.numpy(),
                        "p_control": log_p[:, gold].exp().repeat_interleave(len(keys)).numpy(),
                        "p_item": log_p[:, ids].exp().flatten().numpy(),
                    },
                    schema_overrides={"layer": pl.Int32},
                )
            )
        return pl.concat(frames)

    def _forward(
        self, passes: Sequence[PreparedPass]
    ) -> tuple[Float[Tensor, "pass row d_model"], Float[Tensor, "pass vocab"]]:
        """Run the prompts; residuals of every row at the last position, and the head's logits."""
        batch = TokenBatch.from_ids(
            [item.sequence[: item.length] for item in passes], padding_side="right"
        )
        sites = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(self.n_rows - 1))]
        result = self.model.run(
            batch,
            # Blocks may lie on several devices; the readout is where the head is.
            capture=Capture(sites, positions=-1, device=self.model.unembedding.weight.device),
            logits="last",
            products=self.config.run_products,
        )
        assert result.logits is not None
        states = torch.stack([result[site][:, 0] for site in sites], dim=1)
        return states, result.logits[:, 0].float()

    def _transform(
        self, lens: Lens, states: Float[Tensor, "pass row d_model"]
    ) -> Float[Tensor, "pass row d_model"]:
        return torch.stack([lens.transform(states[:, row], row) for row in range(self.n_rows)], 1)

    def _read(
        self,
        hidden: Float[Tensor, "pass row d_model"],
        logits: Float[Tensor, "pass vocab"],
        tokens: Tensor,
        against: Float[Tensor, "pass row d_model"] | None,
    ) -> Readout:
        pairwise = against is not None
        return readout(
            hidden.flatten(0, 1),
            self.model.unembedding,
            request=replace(REQUEST, js=pairwise, l1=pairwise),
            reference=Reference(
                index=torch.arange(len(hidden)).repeat_interleave(self.n_rows), logits=logits
            ),
            against=None if against is None else against.flatten(0, 1),
            tokens=tokens.repeat_interleave(self.n_rows, 0),
            products=self.config.products,
            kernels=self.kernels,
            budget_bytes=self.config.readout_bytes,
        )

    def _frame(
        self, name: str, result: Readout, asked: Sequence[Asked], golds: Tensor
    ) -> pl.DataFrame:
        n, count = self.n_rows, len(asked)
        assert result.top_ids is not None and result.top_log2p is not None
        assert result.token_log2p is not None and result.token_rank is not None
        assert result.reference is not None and result.top1_top2_gap is not None
        probs = result.top_log2p.double().exp2()
        log2p = result.token_log2p[:, ANSWER].double()
        is_top = result.top_ids[:, 0] == golds.repeat_interleave(n)
        gap = result.top1_top2_gap.double()
        columns: dict[str, Any] = {
            "prompt_index": [entry.index for entry in asked for _ in range(n)],
            "lens": [name] * (n * count),
            "layer": list(range(n)) * count,
            "pos": [entry.prepared.length - 1 for entry in asked for _ in range(n)],
            "is_last": [True] * (n * count),
            "entropy_bits": result.entropy_bits,
            "teacher_entropy_bits": result.reference_entropy_bits,
            "kl_to_final_bits": result.reference.kl_to_bits,
            "p_top1": probs[:, 0],
            "p_answer": log2p.exp2(),
            "answer_log2p": log2p,
            "answer_logit_gap": torch.where(is_top, gap, torch.nan),
        }
        if result.against is not None:
            columns |= {
                "kl_norm_vs_raw_bits": result.against.kl_to_bits,
                "js_norm_raw_bits": result.against.js_bits,
                "l1_norm_raw": result.against.l1,
            }
        series = [pl.Series(key, _array(value)) for key, value in columns.items()]
        built = pl.DataFrame(series).with_columns(
            _list("top_ids", result.top_ids, pl.Int32),
            _list("top_probs", probs, pl.Float64),
            *_ranks(result),
            nonfinite=pl.Series(result.nonfinite.numpy()),
        )
        numbers = pl.selectors.float()
        built = built.with_columns(pl.when(numbers.is_finite()).then(numbers).name.keep())
        top = result.top_ids[:, 0].tolist()
        texts = [self.strings[token] if token >= 0 else None for token in top]
        built = built.with_columns(
            pl.Series("token", texts, dtype=pl.String),
            pl.Series("top1_ignorable", [None if t is None else is_ignorable(t) for t in texts]),
            *(
                pl.lit(None, ROW_SCHEMA[key]).alias(key)
                for key in ("fact_key", "fact_index", "prompt_id", "prompt_variant")
            ),
            norm_choice=pl.lit(self.lenses[name].norm_choice),
            norm_module=pl.Series(
                [self.lenses[name].norm_module(row) for row in range(n)] * count, dtype=pl.String
            ),
        )
        return conform(built)


def _first(item: PreparedPass) -> int:
    token = item.alignment.first_id
    assert token is not None, "only aligned answers are read"
    return token


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _list(name: str, values: Tensor, dtype: type[pl.DataType]) -> pl.Series:
    return pl.Series(name, values.numpy()).arr.to_list().cast(pl.List(dtype)).alias(name)


def _ranks(result: Readout) -> list[pl.Series]:
    """Ranks of answer and foil; 0, the readout's "no such token", becomes null."""
    assert result.token_rank is not None
    found: list[pl.Series] = []
    for name, column in (("answer_rank", ANSWER), (FOIL_RANK, FOIL)):
        ranks = pl.Series(name, result.token_rank[:, column].numpy()).cast(pl.Int32)
        found.append(ranks.replace(0, None))
    return found


def _head(logits: Float[Tensor, "pass vocab"], golds: Tensor) -> list[dict[str, float | int]]:
    """Return what the model itself says of each answer: probability and rank."""
    gold = logits.gather(1, golds.to(logits.device)[:, None])
    log_p = (gold.double() - logits.double().logsumexp(-1, keepdim=True))[:, 0]
    ranks = 1 + (logits > gold).sum(-1)
    return [
        {"p_answer_model": float(p), "answer_rank_model": int(rank)}
        for p, rank in zip(log_p.exp().tolist(), ranks.tolist(), strict=True)
    ]
