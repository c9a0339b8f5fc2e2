"""The same planted dictionary, stored in thirteen formats, must be the same dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import planted
from stored import LAYER, WRITERS

from layerscope.errors import DictionaryError
from layerscope.features import detect, load, open_set, write_dictionary
from layerscope.features.formats import FORMATS
from layerscope.features.inspect import inspect
from layerscope.models import Site

PLANTED = planted()


def test_every_format_has_a_case() -> None:
    assert [each.code for each in FORMATS] == [f"F{i}" for i in range(1, 14)]
    assert {name.split()[0] for name in WRITERS} == {each.code for each in FORMATS}


@pytest.mark.parametrize("name", WRITERS)
def test_activations_and_reconstructions_are_the_planted_ones(name: str, tmp_path: Path) -> None:
    case = WRITERS[name](PLANTED, tmp_path / "stored")
    dictionary = load(case.path, **case.options)
    assert f"F{name.split()[0][1:]}" == detect(case.path)[0].format
    assert dictionary.reads == Site("resid_post", LAYER), dictionary.convention
    x = PLANTED.x[None].float()  # one sequence: temporal dictionaries need one
    found = dictionary.encode(x)[0].double()
    scale = PLANTED.values.abs().max()
    assert float((found - PLANTED.values).abs().max() / scale) < 1e-6
    made = dictionary.reconstruct(x)[0].double()
    assert float((made - PLANTED.x).abs().max() / PLANTED.x.abs().max()) < 1e-6
    directions = dictionary.write_directions(range(24)).double()
    assert float((directions - PLANTED.directions).abs().max()) < 1e-6


@pytest.mark.parametrize("name", WRITERS)
def test_rows_read_one_by_one_equal_the_whole(name: str, tmp_path: Path) -> None:
    case = WRITERS[name](PLANTED, tmp_path / "stored")
    lazy = load(case.path, resident=False, **case.options)
    eager = load(case.path, **case.options)
    chosen = [17, 0, 23, 5]
    for part, whole in zip(
        (lazy.encoder, *lazy.decoders), (eager.encoder, *eager.decoders), strict=True
    ):
        assert not part.resident and whole.resident
        assert part.rows(chosen).numpy().tobytes() == whole.rows(chosen).numpy().tobytes()
        assert part.bytes_read < whole.bytes_read
        assert part.tensor().numpy().tobytes() == whole.tensor().numpy().tobytes()


@pytest.mark.parametrize("name", WRITERS)
def test_headers_say_what_is_there(name: str, tmp_path: Path) -> None:
    case = WRITERS[name](PLANTED, tmp_path / "stored")
    (header,) = inspect(case.path)
    assert header.problem is None
    assert (header.features, header.found.layer) == (24, LAYER)
    assert header.nbytes >= 2 * 24 * 32 * 4


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "F13"])
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    case = WRITERS[name](PLANTED, tmp_path / "stored")
    dictionary = load(case.path, **case.options)
    again = load(write_dictionary(dictionary, tmp_path / "again"))
    x = PLANTED.x.float()
    torch.testing.assert_close(again.encode(x), dictionary.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.reconstruct(x), dictionary.reconstruct(x))
    assert again.reads == dictionary.reads


def test_folding_twice_is_refused(tmp_path: Path) -> None:
    case = WRITERS["F1 before version 6"](PLANTED, tmp_path / "stored")
    with pytest.raises(DictionaryError, match="give activation_scale"):
        load(case.path)
    dictionary = load(case.path, **case.options)
    assert "s=0.37 folded" in dictionary.convention
    with pytest.raises(DictionaryError, match="folded already"):
        dictionary.fold(0.37)
    write_dictionary(dictionary, tmp_path / "again")
    with pytest.raises(DictionaryError, match="second time"):
        load(tmp_path / "again", activation_scale=0.37)


def test_a_set_keeps_one_space_and_refuses_two_of_a_layer(tmp_path: Path) -> None:
    dictionary = load(WRITERS["F1 standard"](PLANTED, tmp_path / "one").path)
    root = tmp_path / "set"
    for layer in (2, 0):
        site = Site("resid_post", layer)
        write_dictionary(dictionary.but(reads=site, writes=(site,)), root / f"at_{layer}")
    dictionaries = open_set(root)
    assert dictionaries.layers == (0, 2)
    assert str(dictionaries[2].id(5)) == "set:resid_post/2/5"
    assert not dictionaries[2].encoder.resident
    with pytest.raises(DictionaryError, match="no dictionary of layer 1"):
        dictionaries[1]
    with pytest.raises(DictionaryError, match="holds 2 dictionaries"):
        load(root)
    site = Site("resid_post", 2)
    write_dictionary(dictionary.but(reads=site, writes=(site,)), root / "wider")
    with pytest.raises(DictionaryError, match="several dictionaries of one layer"):
        open_set(root)


def test_nothing_recognised_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DictionaryError, match="holds no dictionary"):
        load(tmp_path)
    with pytest.raises(DictionaryError, match="there is no"):
        load(tmp_path / "absent")
    with pytest.raises(DictionaryError, match="did you mean 'sparsify'"):
        detect(tmp_path, format="sparsifi")
