"""A small made-up table with every column filled: consistent statistics of real distributions.

Each pass has logits that drift from an echo of the last prompt token to the answer, so that curves,
milestones and checks look as they do for a trained model.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from layerscope.measures.table import (
    HeadInfo,
    LastRowInfo,
    LayersTable,
    PromptInfo,
    TableMeta,
    conform,
)

CAPITALS = (
    ("Germany", "Berlin"),
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Japan", "Tokyo"),
    ("Canada", "Ottawa"),
)
WORDS = (
    "<s>",
    *(" Give", " the", " city", " name", " only", ".", " The", " capital", " of", " is", " called"),
    *(
        " simply",
        " a",
        " and",
        ",",
        '"',
        " in",
        " it",
        "<b>&amp;</b>",
        "\n",
        " 東京",
        "，",
        " which",
    ),
)
D_VOCAB = 160
OVERLAP = 50
TOP = 20
WIDTH = 24


def synthetic_table(
    n_layers: int = 6,
    n_facts: int = 2,
    lenses: tuple[str, ...] = ("raw", "norm"),
    seed: int = 0,
) -> LayersTable:
    """Return a table of 2 * n_facts + 1 passes (orig, no_filler; one control) at all positions.

    A fact's answer becomes top-1 about two thirds of the way up. Row n of the norm lens is the
    model's own head.
    """
    maker = _Maker(n_layers=n_layers, n_facts=n_facts, lenses=lenses, seed=seed)
    rows: list[dict[str, object]] = []
    prompts: list[PromptInfo] = []
    for fact in range(n_facts):
        for variant in ("orig", "no_filler"):
            maker.add(rows, prompts, fact=fact, variant=variant, control=False)
    maker.add(rows, prompts, fact=1, variant="orig", control=True)
    meta = TableMeta(
        model="synthetic",
        n_layers=n_layers,
        d_vocab=D_VOCAB,
        d_model=WIDTH,
        n_heads=4,
        n_ctx=64,
        architecture="pre_norm",
        unembed_bias={"present": False, "l2_norm": 0.0, "max_abs": 0.0},
        ignored_token_count=5,
        ignored_token_sample=(".", ",", '"', "\n", "，"),
        prompts=tuple(prompts),
        provenance={"model": {"id": "synthetic", "dtype": "float32", "device": "cpu"}},
    )
    return LayersTable(rows=conform(pl.DataFrame(rows, infer_schema_length=None)), meta=meta)


class _Maker:
    def __init__(self, *, n_layers: int, n_facts: int, lenses: tuple[str, ...], seed: int) -> None:
        self.n_layers, self.lenses = n_layers, lenses
        self.random = np.random.default_rng(seed)
        pairs = [
            CAPITALS[i] if i < len(CAPITALS) else (f"Land{i}", f"Town{i}")
            for i in range(max(2, n_facts))
        ]
        self.pairs = pairs
        named = [*WORDS, *(f" {word}" for pair in pairs for word in pair)]
        self.vocab = [*named, *(f" w{i}" for i in range(len(named), D_VOCAB))][:D_VOCAB]
        self.ids = {text: index for index, text in enumerate(self.vocab)}
        self.unembed = self.random.normal(size=(D_VOCAB, WIDTH)) / np.sqrt(WIDTH)

    def add(
        self,
        rows: list[dict[str, object]],
        prompts: list[PromptInfo],
        *,
        fact: int,
        variant: str,
        control: bool,
    ) -> None:
        country, answer = self.pairs[fact]
        foil = self.pairs[0][1] if control else None
        words = [" The", " capital", " of", f" {country}", " is", " called"]
        words += [" simply"] if variant == "orig" else []
        tokens = ["<s>", *words]
        index = len(prompts)
        identity = {
            "prompt_index": index,
            "fact_key": None if control else f"{country}→{answer}",
            "fact_index": None if control else fact,
            "prompt_id": "ctl" if control else "pos",
            "prompt_variant": variant,
        }
        answer_id = self.ids[f" {answer}"]
        foil_id = self.ids[f" {foil}"] if foil else None
        prompt_ids = tuple(self.ids[word] for word in words)
        last = len(tokens) - 1
        last_rows: dict[str, LastRowInfo] = {}
        head: HeadInfo | None = None
        for pos in range(len(tokens)):
            target = answer_id if pos == last else self.ids[tokens[pos + 1]]
            stacks = self._stacks(target=target, echo=self.ids[tokens[pos]])
            final = stacks["norm"][-1]
            if pos == last:
                head = self._head(final, answer_id)
            for lens in self.lenses:
                logits = stacks[lens if lens in stacks else "norm"]
                for layer in range(self.n_layers + 1):
                    previous = logits[layer - 1] if layer else None
                    row = identity | {
                        "lens": lens,
                        "layer": layer,
                        "pos": pos,
                        "is_last": pos == last,
                        "token": tokens[pos],
                        "norm_choice": "none" if lens == "raw" else "final",
                        "norm_module": "" if lens == "raw" else "model.norm",
                    }
                    row |= self._every(logits[layer], final, layer)
                    if pos == last:
                        row |= self._last(logits[layer], final, previous, answer_id, foil_id)
                        row |= self._surface(logits[layer], answer_id, prompt_ids, layer)
                        if lens == "norm":
                            row |= self._pair(logits[layer], stacks["raw"][layer])
                    rows.append(row)
                if pos == last:
                    last_rows[lens] = self._last_row(lens, logits[-1], final, answer_id)
        prompts.append(
            PromptInfo(
                **identity,  # type: ignore[arg-type]
                text="".join(words).strip(),
                prompt_ids=prompt_ids,
                tokens=tuple(tokens),
                answer=answer,
                answer_ids=(answer_id,),
                answer_pieces=(f" {answer}",),
                answer_variant="with_space",
                foil=foil,
                foil_id=foil_id,
                head=head,
                last_rows=tuple(last_rows.values()),
            )
        )

    def _stacks(self, *, target: int, echo: int) -> dict[str, np.ndarray]:
        noise = self.random.normal(size=(self.n_layers + 1, D_VOCAB))
        shared = self.random.normal(size=D_VOCAB)
        raw, norm = [], []
        for layer in range(self.n_layers + 1):
            depth = layer / self.n_layers
            logits = 0.6 * noise[layer] * (1 - depth) + 1.2 * shared * depth
            logits[echo] += 11.0 * max(0.0, 1 - 2.5 * depth)
            logits[target] += 9.0 / (1 + np.exp(-12 * (depth - 0.6)))
            norm.append(logits)
            raw.append(0.7 * logits + 0.25 * self.random.normal(size=D_VOCAB))
        return {"raw": np.array(raw), "norm": np.array(norm)}

    def _every(self, z: np.ndarray, final: np.ndarray, layer: int) -> dict[str, object]:
        logp, top = _logp(z), np.argsort(-z, kind="stable")[:TOP]
        best = int(np.argmax(final))
        return {
            "entropy_bits": _entropy(logp),
            "top_ids": top.tolist(),
            "top_tokens": [self.vocab[i] for i in top],
            "top_probs": np.exp(logp[top]).tolist(),
            "top1_top2_gap": float(z[top[0]] - z[top[1]]),
            "kl_to_final_bits": _kl(logp, _logp(final)),
            "final_top1_rank": int(1 + (z > z[best]).sum()),
            "final_top1_prob": float(np.exp(logp[best])),
            "resid_norm": float(2.0 * 1.5**layer),
            "max_abs_logit": float(np.abs(z).max()),
            "min_prob": float(np.exp(logp.min())),
            "nonfinite": False,
        }

    def _last(
        self,
        z: np.ndarray,
        final: np.ndarray,
        previous: np.ndarray | None,
        answer: int,
        foil: int | None,
    ) -> dict[str, object]:
        logp, log_final = _logp(z), _logp(final)
        p, order = np.exp(logp), np.sort(z)[::-1]
        middle = np.logaddexp(logp, log_final) - np.log(2)
        rank = int(1 + (z > z[answer]).sum())
        text = self.vocab[int(np.argmax(z))].strip()
        return {
            "p_top1": float(p.max()),
            "p_top5": float(np.sort(p)[-5:].sum()),
            "p_answer": float(p[answer]),
            "answer_rank": rank,
            "answer_log2p": float(logp[answer] / np.log(2)),
            "answer_full_log2p": float(logp[answer] / np.log(2)),
            "answer_logit_gap": float(z[answer] - order[1]) if rank == 1 else None,
            "answer_vs_top1_gap": float(z[answer] - order[0]) if rank > 1 else None,
            "p_foil": float(p[foil]) if foil is not None else None,
            "control_margin": float(p[answer] - p[foil]) if foil is not None else None,
            "teacher_entropy_bits": _entropy(log_final),
            "kl_from_final_bits": _kl(log_final, logp),
            "js_to_final_bits": (_kl(logp, middle) + _kl(log_final, middle)) / 2,
            "l1_to_final": float(np.abs(p - np.exp(log_final)).sum()),
            "kl_to_final_bits_norm_temp": _kl(_logp(z / 0.9), log_final),
            "cos_to_final": _cosine(z, final),
            "top1_ignorable": not any(c.isalnum() for c in text),
            "topk_jaccard_consecutive": None if previous is None else _jaccard(z, previous),
        }

    def _surface(
        self, z: np.ndarray, answer: int, prompt_ids: tuple[int, ...], layer: int
    ) -> dict[str, object]:
        p = np.exp(_logp(z))
        hidden = z @ self.unembed
        cosines = [_cosine(hidden, self.unembed[i]) for i in prompt_ids]
        top = set(np.argsort(-z)[:OVERLAP].tolist())
        return {
            "cos_to_answer": _cosine(hidden, self.unembed[answer]),
            "cos_to_prompt_max": max(cosines),
            "echo_mass_prompt": float(p[list(set(prompt_ids))].sum()),
            "topk_prompt_mass": float(sum(p[i] for i in set(prompt_ids) & top)),
            "resid_norm_ratio": float(4.0 / 1.3**layer),
            "delta_resid_cos": 0.9,
        }

    def _pair(self, norm: np.ndarray, raw: np.ndarray) -> dict[str, object]:
        a, b = _logp(norm), _logp(raw)
        middle = np.logaddexp(a, b) - np.log(2)
        return {
            "kl_norm_vs_raw_bits": _kl(a, b),
            "kl_raw_to_norm_bits": _kl(b, a),
            "js_norm_raw_bits": (_kl(a, middle) + _kl(b, middle)) / 2,
            "l1_norm_raw": float(np.abs(np.exp(a) - np.exp(b)).sum()),
            "topk_jaccard_raw_norm": _jaccard(norm, raw),
        }

    def _head(self, final: np.ndarray, answer: int) -> HeadInfo:
        logp = _logp(final)
        top = np.argsort(-final)[:TOP]
        return HeadInfo(
            entropy_bits=_entropy(logp),
            top_ids=tuple(int(i) for i in top),
            top_tokens=tuple(self.vocab[i] for i in top),
            top_probs=tuple(float(value) for value in np.exp(logp[top])),
            p_answer=float(np.exp(logp[answer])),
            answer_rank=int(1 + (final > final[answer]).sum()),
        )

    def _last_row(self, lens: str, z: np.ndarray, final: np.ndarray, answer: int) -> LastRowInfo:
        logp, log_final = _logp(z), _logp(final)
        grid = np.unique(np.append(np.geomspace(0.1, 10, 25), 1.0))
        after = [_kl(_logp(z / s), log_final) for s in grid]
        return LastRowInfo(
            lens=lens,
            kl_to_final_bits=_kl(logp, log_final),
            top1_agree=bool(np.argmax(z) == np.argmax(final)),
            p_top1_lens=float(np.exp(logp.max())),
            p_top1_model=float(np.exp(log_final.max())),
            p_answer_lens=float(np.exp(logp[answer])),
            answer_rank_lens=int(1 + (z > z[answer]).sum()),
            temp_est=float(grid[int(np.argmin(after))]),
            kl_after_temp_bits=float(min(after)),
        )


def _logp(z: np.ndarray) -> np.ndarray:
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def _entropy(logp: np.ndarray) -> float:
    return float(-(np.exp(logp) * logp).sum() / np.log(2))


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    return max(0.0, float((np.exp(a) * (a - b)).sum() / np.log(2)))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    first, second = (set(np.argsort(-z)[:OVERLAP].tolist()) for z in (a, b))
    return len(first & second) / len(first | second)
