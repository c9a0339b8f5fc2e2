"""The small tables behind the corpus."""

from layerscope.demo import facts, tasks


def test_facts_table_is_sound() -> None:
    table = facts.facts_table()
    countries = [row["country"] for row in table]
    capitals = [row["capital"] for row in table]
    assert len(countries) >= 60
    assert len(set(countries)) == len(countries)
    assert len(set(capitals)) == len(capitals)
    for row in table:
        assert list(row) == ["country", "capital", "currency", "language"]
        assert all(cell and cell == cell.strip() for cell in row.values())
        assert row["currency"] == row["currency"].lower()
        assert row["language"][0].isupper()


def test_every_relation_has_many_phrasings() -> None:
    for relation in facts.RELATIONS:
        names = [p.name for p in facts.phrasings() if p.relation == relation]
        assert len(names) >= 15
        assert len(set(names)) == len(names)
    for phrasing in facts.phrasings():
        assert phrasing.text.count("{country}") == 1
        assert phrasing.text.count("{answer}") == 1


def test_no_phrasing_contains_another() -> None:
    """Else a held-out statement would occur inside the longer phrasing."""
    texts = [p.text for p in facts.phrasings()]
    for text in texts:
        assert [other for other in texts if text in other] == [text]


def test_words_occur_in_several_tasks() -> None:
    words = [row["word"] for row in tasks.word_table()]
    assert len(set(words)) == len(words)
    for row in tasks.word_table():
        assert row["spanish"]
        assert row["antonym"] or row["plural"] or row["past"]
    for task in tasks.TASKS:
        assert len(tasks.words_for(task)) >= 60
