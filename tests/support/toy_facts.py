"""Facts planted by hand: where they are moved and where they are looked up is known.

A prompt is a subject and a question, with fillers between them if wanted. Head 1.0 moves the
subject to the last position; the MLP of block 2 looks the pair of subject and question up and
writes the answer. Everything else writes nothing. So at the answer slot

- attention's output decides from block 1 on (row 2), and with it the whole stream
- the MLP's output of block 2 alone decides (row 3)
- a lens reads the answer from row 3 on: one row after it is decided.

Two relations in one language, one of them in a second language with answers of its own.
"""

from __future__ import annotations

import torch

from layerscope.experiments.battery import Battery
from layerscope.models import LanguageModel
from support.toys import bare_gpt2

N_SUBJECTS, N_LAYERS, N_CTX = 6, 4, 4
DEFAULT, FILLER = 40, 41  # what is said without an answer; a word that means nothing
D_VOCAB = 42
# Question token -> first answer token; subject s is answered by the first plus s.
QUESTIONS = {"one": (20, 6), "two": (21, 12), "eins": (22, 26)}
MOVED_ROW, LOOKED_UP_ROW, HEAD = 2, 3, (1, 0)
ANSWER_LOGIT, DEFAULT_LOGIT = 10.0, 1.0

TOKEN = slice(0, D_VOCAB)
POSITION = slice(TOKEN.stop, TOKEN.stop + N_CTX)
MOVED = slice(POSITION.stop, POSITION.stop + N_SUBJECTS)
OUTPUT = slice(MOVED.stop, MOVED.stop + D_VOCAB)


def fact_model() -> LanguageModel:
    """Return the planted model in float64."""
    toy = bare_gpt2(
        n_layers=N_LAYERS,
        n_heads=2,
        d_model=OUTPUT.stop,
        d_mlp=N_SUBJECTS * len(QUESTIONS),
        d_vocab=D_VOCAB,
        n_ctx=N_CTX,
    )
    with torch.no_grad():
        toy.embed[:, TOKEN] = torch.eye(D_VOCAB, dtype=torch.float64)
        toy.positions[:, POSITION] = torch.eye(N_CTX, dtype=torch.float64)
        toy.positions[:, OUTPUT.start + DEFAULT] = DEFAULT_LOGIT
        toy.unembed[:, OUTPUT] = torch.eye(D_VOCAB, dtype=torch.float64)
        layer, head = HEAD
        toy.w_q(layer, head)[POSITION.start + 1 : POSITION.stop, 0] = 60.0
        toy.w_k(layer, head)[POSITION.start, 0] = 1.0
        subjects = torch.arange(N_SUBJECTS)
        toy.w_v(layer, head)[TOKEN.start + subjects, subjects] = 1.0
        toy.w_o(layer, head)[subjects, MOVED.start + subjects] = 1.0
        block = LOOKED_UP_ROW - 1
        neuron = 0
        for question, first in QUESTIONS.values():
            for subject in range(N_SUBJECTS):
                toy.w_in(block)[MOVED.start + subject, neuron] = 1.0
                toy.w_in(block)[TOKEN.start + question, neuron] = 1.0
                toy.b_in(block)[neuron] = -1.0
                toy.w_out(block)[neuron, OUTPUT.start + first + subject] = ANSWER_LOGIT
                neuron += 1
    return toy.model()


def prompt(subject: int, question: str, fillers: int = 0) -> str:
    """Return a question as text."""
    words = [subject, *[FILLER] * fillers, QUESTIONS[question][0]]
    return " ".join(f"t{word}" for word in words)


def rows(*questions: str, fillers: dict[int, int] | None = None) -> list[dict[str, str]]:
    """Return battery rows of some questions, each with one paraphrase; "eins" is German."""
    found: list[dict[str, str]] = []
    for question in questions:
        for subject in range(N_SUBJECTS):
            more = (fillers or {}).get(subject, 0)
            base = {
                "relation": "one" if question == "eins" else question,
                "subject": f"s{subject}",
                "answer": f"t{QUESTIONS[question][1] + subject}",
                "language": "de" if question == "eins" else "en",
            }
            found.append(base | {"prompt": prompt(subject, question, more), "variant": "orig"})
            found.append(base | {"prompt": prompt(subject, question, 1 - more), "variant": "p01"})
    return found


def battery_of(entries: list[dict[str, str]]) -> Battery:
    """Return rows as a battery."""
    from layerscope.experiments.battery.items import from_records
    from layerscope.experiments.battery.wordings import Wordings

    return from_records("planted facts", entries, Wordings.builtin())
