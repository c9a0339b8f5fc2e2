"""The shipped battery is whole and well-formed; users' tables are read, or refused in one line."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from layerscope.errors import PromptError
from layerscope.experiments.battery import Battery, Wordings
from layerscope.experiments.battery.shipped import LANGUAGES, RELATIONS, control_item
from layerscope.experiments.battery.wordings import SINGLE, of_name


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_shipped_battery_holds_three_relations_in_five_languages() -> None:
    battery = Battery.builtin()
    real = [item for item in battery.items if not item.invented]
    for language in LANGUAGES:
        for relation in RELATIONS:
            own = [i for i in real if (i.relation, i.language) == (relation, language)]
            assert len(own) >= 150, (relation, language)
            assert len({item.entity for item in own}) == len(own)
    assert len({item.entity for item in real}) >= 190
    known = {key for key, _ in battery.absent} | {item.key for item in battery.items}
    assert len(known) == len(battery.absent) + len(battery.items)  # each cell is one or the other


def test_shipped_facts_spot_checked() -> None:
    answers = {item.key: item.answer for item in Battery.builtin().items}
    assert answers["capital/en/DEU"] == "Berlin"
    assert answers["capital/de/ITA"] == "Rom"
    assert answers["capital/fr/GBR"] == "Londres"
    assert answers["capital/es/EGY"] == "El Cairo"
    assert answers["capital/zh/JPN"] == "东京"
    assert answers["currency/en/JPN"] == "yen"
    assert answers["language/de/BRA"] == "Portugiesisch"
    absent = dict(Battery.builtin().absent)
    assert "capital/en/ISR" in absent  # contested, so left out and listed
    assert "language/en/BEL" in absent


def test_no_shipped_answer_or_name_has_stray_white_space() -> None:
    for item in Battery.builtin().items:
        for text in (item.subject, item.of, item.answer):
            assert text == text.strip() and "  " not in text and "=" not in text


def test_every_wording_of_every_shipped_item_ends_where_its_answer_begins() -> None:
    battery = Battery.builtin()
    for item in battery.items:
        variants = [*SINGLE, *battery.wordings.paraphrases(item)]
        texts = {variant: battery.wordings.text(item, variant) for variant in variants}
        assert len(battery.wordings.paraphrases(item)) == 10
        for variant, text in texts.items():
            assert text, (item.key, variant)
            assert "{" not in text
            assert text == text.strip() or variant == "novel"
        # Túnez is the capital of Túnez; such an item is left out when its answer is aligned.
        assert len(set(texts.values())) == len(texts) or item.subject == item.answer
        assert item.subject in texts["orig"] or item.of in texts["orig"]
        told = texts["novel"]
        assert told is not None and item.answer in told


def test_articles_and_elisions() -> None:
    items = {item.key: item for item in Battery.builtin().items}
    text = Battery.builtin().wordings.text

    def orig(key: str) -> str:
        found = text(items[key], "no_filler")
        assert found is not None
        return found

    assert orig("capital/en/NLD").endswith("The capital of the Netherlands is called")
    assert orig("capital/de/CHE").endswith("Die Hauptstadt der Schweiz heißt")
    assert orig("capital/de/DEU").endswith("Die Hauptstadt von Deutschland heißt")
    assert orig("capital/de/IRQ").endswith("Die Hauptstadt des Irak heißt")
    assert orig("capital/fr/JPN").endswith("La capitale du Japon s'appelle")
    assert orig("capital/fr/DEU").endswith("La capitale de l'Allemagne s'appelle")
    assert orig("capital/fr/USA").endswith("La capitale des États-Unis s'appelle")
    assert orig("capital/es/GBR").endswith("La capital del Reino Unido se llama")
    assert orig("capital/zh/FRA") == "只写城市名，纯文本。法国的首都叫"
    assert text(items["capital/en/NLD"], "p03") == "The Netherlands's capital is"
    assert text(items["capital/en/NLD"], "reversed") == (
        "Give the country name only, plain text. Amsterdam is the capital of the"
    )
    assert of_name("Athènes", "fr") == "d'Athènes"
    assert of_name("Le Caire", "fr") == "du Caire"


def test_limit_takes_the_same_subjects_in_every_language_from_every_stratum() -> None:
    battery = Battery.builtin().select(relations=["capital"], limit=9)
    per_language = {
        language: {i.entity for i in battery.items if i.language == language and not i.invented}
        for language in LANGUAGES
    }
    assert per_language["en"] == per_language["de"] and len(per_language["en"]) == 9
    strata = [i.frequency for i in battery.items if i.language == "en" and not i.invented]
    assert {strata.count(name) for name in ("high", "medium", "low")} == {3}


def test_limit_and_digest_do_not_depend_on_the_order_of_items() -> None:
    battery = Battery.builtin()
    shuffled = list(battery.items)
    random.Random(1).shuffle(shuffled)
    other = replace(battery, items=tuple(shuffled))
    assert other.digest() == battery.digest()
    kept = {item.key for item in battery.select(limit=5).items}
    assert {item.key for item in other.select(limit=5).items} == kept


def test_control_is_france() -> None:
    item = control_item("capital", "de")
    assert item is not None and item.answer == "Paris"
    assert control_item("mayor", "en") is None


def test_unknown_selection_names_the_nearest() -> None:
    with pytest.raises(PromptError, match="did you mean 'capital'"):
        Battery.builtin().select(relations=["capitals"])
    with pytest.raises(PromptError, match="no language 'it'"):
        Battery.builtin().select(languages=["it"])
    with pytest.raises(PromptError, match="at least 1"):
        Battery.builtin().select(limit=0)


def test_plain_table_takes_the_wordings_of_its_relation(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.csv",
        "relation,subject,answer,language,of\n"
        "capital,Atlantis,Poseidonis,,\ncapital,Schlaraffenland,Breiberg,de,des Schlaraffenlands\n",
    )
    battery = Battery.from_file(path)
    text = battery.wordings.text
    assert battery.name == "mine"
    assert str(text(battery.items[0], "orig")).endswith("of Atlantis is called simply")
    assert str(text(battery.items[1], "orig")).endswith("des Schlaraffenlands heißt einfach")


def test_own_prompts_group_by_subject(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.csv",
        "relation,subject,answer,prompt,variant\n"
        "colour,grass,green,The grass is,orig\ncolour,grass,green,Grass looks,p01\n",
    )
    (item,) = Battery.from_file(path).items
    assert dict(item.prompts) == {"orig": "The grass is", "p01": "Grass looks"}
    assert Wordings.builtin().paraphrases(item) == ["p01"]


def test_yaml_brings_wordings_of_its_own(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.yaml",
        "name: heights\nwordings:\n  peak:\n    en: {orig: 'The highest peak {of} is',"
        " paraphrases: ['{Subject} is crowned by']}\n"
        "items:\n  - {relation: peak, subject: Nepal, answer: Everest}\n",
    )
    battery = Battery.from_file(path)
    assert battery.name == "heights"
    assert battery.wordings.text(battery.items[0], "orig") == "The highest peak of Nepal is"
    assert battery.wordings.text(battery.items[0], "p01") == "Nepal is crowned by"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("relation,subject\ncapital,X\n", "column.s. answer missing"),
        ("relation,subject,anwser\ncapital,X,Y\n", "did you mean 'anwser'"),
        ("relation,subject,answer,colour\ncapital,X,Y,red\n", "unknown column 'colour'"),
        ("relation,subject,answer\ncapital,X,\n", "row 1: answer missing"),
        ("relation,subject,answer\ncapital,X\n", "row 1: 3 cells expected"),
        ("relation,subject,answer\n", "is empty"),
        ("relation,subject,answer\ncapital,X,Y\ncapital,X,Y\n", "row 2: capital/en/X .* twice"),
        ("relation,subject,answer\ncapitol,X,Y\n", "did you mean 'capital'"),
        ("relation,subject,answer,language\ncapital,X,Y,it\n", "no wording in 'it'"),
        ("relation,subject,answer,variant\ncapital,X,Y,p01\n", "variant 'p01' has no prompt"),
        (
            "relation,subject,answer,prompt,variant\nc,X,Y,The X is,p01\n",
            "no plain wording; add one named orig",
        ),
        (
            "relation,subject,answer,prompt,variant\nc,X,Y,a,orig\nc,X,Z,b,p01\n",
            "need the same answer",
        ),
    ],
)
def test_bad_tables_are_one_line_errors(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path / "bad.csv", text)
    with pytest.raises(PromptError, match=says) as caught:
        Battery.from_file(path)
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value) or "is empty" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("items: 3\n", "give a list of items"),
        ("item: []\n", "unknown entry 'item'"),
        ("a: [\n", "not valid YAML"),
        ("wordings: {peak: {en: {orig: 'The {top} is'}}}\nitems: []\n", "unknown slot {top}"),
        ("wordings: {peak: {en: {plain: 'x'}}}\nitems: []\n", "give a mapping with orig"),
        ("wordings: {peak: {en: {orig: 'x', orgi: 'y'}}}\nitems: []\n", "did you mean 'orig'"),
        ("wordings: {peak: {en: {orig: 'The {of is'}}}\nitems: []\n", "brace"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        Battery.from_file(written(tmp_path / "bad.yaml", text))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        Battery.from_file(tmp_path / "none.csv")
    with pytest.raises(PromptError, match=r"must be a \.csv"):
        Battery.from_file(tmp_path / "none.txt")
    (tmp_path / "latin.csv").write_bytes(b"relation,subject,answer\ncapital,\xe9,x\n")
    with pytest.raises(PromptError, match="UTF-8"):
        Battery.from_file(tmp_path / "latin.csv")
