"""Tasks for function vectors: word pairs, and the prompts that show them to a model.

A task is shown in three ways: by examples (clean), by examples whose answers were shuffled among
them, and not at all (zero-shot). Each query appears in all three, with one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from layerscope.errors import AlignmentError, ConfigError, PromptError
from layerscope.interventions.records import read_records
from layerscope.models import LanguageModel, align_answer

Pair = tuple[str, str]

_NAMES = (("input", "output"), ("subject", "object"), ("query", "answer"))


@dataclass(frozen=True)
class Layout:
    """How an example and a query are written: before the input, between, after the answer.

    The default is that of Todd et al. 2024; the answer is joined to what stands before it by a
    space.
    """

    before: str = "Q: "
    between: str = "\nA:"
    after: str = "\n\n"
    front: str = ""

    def text(self, shots: Sequence[Pair], query: str) -> str:
        """Return the prompt of a query after examples."""
        lines = "".join(f"{self.before}{x}{self.between} {y}{self.after}" for x, y in shots)
        return f"{self.front}{lines}{self.before}{query}{self.between}"

    def to_dict(self) -> dict[str, str]:
        """Return the layout, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """A task: pairs of an input and its answer, and optionally the inputs to be tested on.

    Attributes:
        name: of the task.
        pairs: (input, answer); an input may occur once.
        test: inputs kept out of examples, means and effects, on which vectors are tested; None
            lets a split decide.
    """

    name: str
    pairs: tuple[Pair, ...]
    test: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for word, answer in self.pairs:
            if not word.strip() or not answer.strip():
                raise PromptError(f"task {self.name!r} has an empty input or answer: {word!r}")
            if word in seen:
                raise PromptError(f"task {self.name!r} has the input {word!r} twice; keep one")
            seen.add(word)
        missing = [word for word in self.test or () if word not in seen]
        if missing:
            raise PromptError(f"task {self.name!r} is tested on {missing[0]!r}, which has no pair")

    def split(self, *, validation: float, test: float, seed: int) -> Splits:
        """Divide the pairs at random, once for a seed: train, validation and test.

        With `test` inputs of the task's own, those are the test part, and `validation` is a share
        of the rest.

        Raises:
            PromptError: a part would be empty.
        """
        rng = Random(seed)
        pairs = list(self.pairs)
        if self.test is not None:
            chosen = set(self.test)
            tested = [pair for pair in pairs if pair[0] in chosen]
            rest = [pair for pair in pairs if pair[0] not in chosen]
            rng.shuffle(rest)
        else:
            rng.shuffle(pairs)
            count = round(test * len(pairs))
            tested, rest = pairs[:count], pairs[count:]
        count = round(validation * len(rest))
        parts = Splits(tuple(rest[count:]), tuple(rest[:count]), tuple(tested))
        for name, part in (("training", parts.train), ("test", parts.test)):
            if not part:
                raise PromptError(
                    f"task {self.name!r} has {len(self.pairs)} pairs, which leaves none for "
                    f"{name}: add pairs or change the split"
                )
        return parts

    def to_dict(self) -> dict[str, Any]:
        """Return the task, ready for JSON."""
        return {
            "name": self.name,
            "pairs": [list(pair) for pair in self.pairs],
            "test": None if self.test is None else list(self.test),
        }


@dataclass(frozen=True)
class Splits:
    """The parts of a task: examples and effects, the choice of the layer, and the test."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


@dataclass(frozen=True)
class Trial:
    """One query shown in three ways, and the first token of its answer.

    Attributes:
        query: the input. answer: what belongs to it.
        clean: after examples. shuffled: after the same examples with their answers permuted.
        zero_shot: the query alone.
        target: id of the answer's first token after the clean prompt.
    """

    query: str
    answer: str
    clean: str
    shuffled: str
    zero_shot: str
    target: int


def read_task(path: str | Path, *, name: str | None = None) -> Task:
    """Read a task from JSON, YAML or CSV.

    Rows have ``input`` and ``output`` (or ``subject`` and ``object``, or ``query`` and ``answer``);
    a mapping may hold them as ``pairs``, ``samples`` or ``prompts`` beside ``name`` and ``test`` (a
    list of inputs). Where an input occurs again, the first answer counts.

    Raises:
        PromptError: the file cannot be read, or holds no pairs.
    """
    path = Path(path)
    content = read_records(path)
    details: Mapping[str, Any] = {}
    if isinstance(content, Mapping):
        details = cast("Mapping[str, Any]", content)
        content = next(
            (details[key] for key in ("pairs", "samples", "prompts") if key in details), None
        )
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise PromptError(f"{path}: give a list of rows with 'input' and 'output'")
    found: dict[str, str] = {}
    for number, row in enumerate(cast("Sequence[Any]", content), start=1):
        word, answer = _pair(row, f"{path}, row {number}")
        found.setdefault(word, answer)
    test = details.get("test")
    tested = None if test is None else tuple(str(word) for word in test)
    return Task(name or str(details.get("name", path.stem)), tuple(found.items()), tested)


def _pair(row: Any, where: str) -> Pair:
    if isinstance(row, Mapping):
        entry = cast("Mapping[str, Any]", row)
        for first, second in _NAMES:
            if first in entry and second in entry:
                row = (entry[first], entry[second])
                break
    if isinstance(row, Sequence) and not isinstance(row, str):
        values = cast("Sequence[Any]", row)
        if len(values) == 2 and all(isinstance(value, str) for value in values):
            return str(values[0]), str(values[1])
    raise PromptError(f"{where}: give 'input' and 'output' as texts")


def make_trials(
    model: LanguageModel,
    queries: Sequence[Pair],
    pool: Sequence[Pair],
    *,
    shots: int,
    count: int,
    layout: Layout,
    seed: int,
) -> tuple[Trial, ...]:
    """Draw queries and examples, and write the prompts.

    Queries are taken in turn, in an order of the seed, until there are `count`; each has examples
    of its own. Answers are permuted so that none keeps its place where that can be had.

    Raises:
        ConfigError: there are fewer than `shots` examples beside a query.
        PromptError: a prompt does not fit the context.
        AlignmentError: an answer does not follow its prompt in whole tokens.
    """
    if shots < 2:
        raise ConfigError(f"{shots} examples cannot be shuffled; use 2 or more")
    rng = Random(seed)
    order = list(queries)
    rng.shuffle(order)
    trials: list[Trial] = []
    for number in range(count if order else 0):
        query, answer = order[number % len(order)]
        others = [pair for pair in pool if pair[0] != query]
        if len(others) < shots:
            raise ConfigError(
                f"there are {len(others)} examples beside {query!r}, and {shots} are wanted: use "
                "fewer, or add pairs"
            )
        examples = rng.sample(others, shots)
        answers = _permuted([y for _, y in examples], rng)
        clean = layout.text(examples, query)
        mixed = [(x, y) for (x, _), y in zip(examples, answers, strict=True)]
        zero = layout.text((), query)
        target = align_answer(model.tokenizer, clean, answer).first_id
        alone = align_answer(model.tokenizer, zero, answer).first_id
        if target is None or target != alone:
            raise AlignmentError(
                f"the answer {answer!r} begins with another token after examples than without; "
                "change the layout"
            )
        trials.append(Trial(query, answer, clean, layout.text(mixed, query), zero, target))
    return tuple(trials)


def _permuted(answers: Sequence[str], rng: Random) -> list[str]:
    """Return a permutation that leaves no answer in its place, or the best of a hundred draws."""
    best: list[str] = []
    kept = len(answers) + 1
    for _ in range(100):
        drawn = list(answers)
        rng.shuffle(drawn)
        same = sum(a == b for a, b in zip(drawn, answers, strict=True))
        if same < kept:
            best, kept = drawn, same
        if same == 0:
            break
    return best
