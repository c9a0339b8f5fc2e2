"""The training text: the same for the same seed, and free of everything that is held out."""

from collections import Counter
from itertools import islice

from layerscope.demo import corpus, facts, tasks
from layerscope.demo.documents import KINDS, Document, for_validation

SAMPLE = 12_000


def sample(seed: int, count: int = SAMPLE) -> list[Document]:
    return list(islice(corpus.documents(seed), count))


def test_same_seed_same_documents() -> None:
    assert sample(1, 500) == sample(1, 500)
    assert sample(1, 500) != sample(2, 500)


def test_every_kind_occurs_in_its_share() -> None:
    counts = Counter(document.kind for document in sample(3, 4000))
    assert set(counts) == set(KINDS)
    for kind, share in corpus.MIXTURE.items():
        assert abs(counts[kind] / 4000 - share) < 0.05


def test_held_out_facts_never_occur_in_training_text() -> None:
    text = "\n".join(document.text for document in sample(4) if document.kind == "facts")
    held_out = [statement for statement in facts.statements() if statement.held_out]
    assert len(held_out) > 300
    found = [s for s in held_out if "".join(piece.text for piece in s.pieces()) in text]
    assert found == []


def test_suite_prompts_never_occur_in_training_text() -> None:
    text = "\n".join(document.text for document in sample(5) if document.kind == "facts")
    items = facts.suite_items()
    assert len(items) == 10
    assert items[0].prompt == (
        "Give the city name only, plain text. The capital of Germany is called simply"
    )
    assert {item.answer for item in items} == {" Berlin", " Paris", " Rome", " Tokyo", " Ottawa"}
    assert not [item for item in items if item.prompt + item.answer in text]
    # The wording itself is taught, with other countries.
    assert "The capital of Spain is called simply Madrid." in text


def test_held_out_task_triples_never_occur_in_training_text() -> None:
    found: list[tuple[str, str, str]] = []
    for document in sample(6):
        if document.kind != "tasks":
            continue
        lines = "".join(document.text)
        for task in tasks.TASKS:
            for word, answer in tasks.words_for(task):
                for style, (before, between, after) in tasks.FORMATS.items():
                    line = f"{before}{word}{between} {answer}{after}"
                    starts_line = lines.startswith(line) or (
                        f"\n{line}" in lines or f", {line}" in lines
                    )
                    if starts_line and tasks.held_out(task, word, style):
                        found.append((task, word, style))
    assert found == []


def test_free_form_kinds_keep_validation_texts_apart() -> None:
    training = {d.text for d in sample(7) if d.kind == "stories"}
    validation = {
        d.text for d in islice(corpus.documents(7, validation=True), 1000) if d.kind == "stories"
    }
    assert validation
    assert all(for_validation(text) for text in validation)
    assert not training & validation


def test_held_out_items_are_well_formed() -> None:
    items = corpus.held_out_items(1, count=40)
    assert set(items) == set(KINDS)
    for kind in KINDS:
        for item in items[kind]:
            assert item.answer.startswith(" ") or item.prompt.endswith('"')
            assert not item.prompt.endswith(" ")
