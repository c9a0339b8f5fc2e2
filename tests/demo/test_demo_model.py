"""The shipped model: its files, its tokenizer, and what it was measured to know."""

import json
from pathlib import Path

import pytest

from layerscope.demo import facts, model_path
from layerscope.demo.evaluate import GOALS, load, score_groups

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "evaluation.json",
    "training.json",
    "MODEL_CARD.md",
)
needs_weights = pytest.mark.skipif(
    not (model_path() / "model.safetensors").exists(), reason="the embedded weights are absent"
)


def read(name: str) -> dict[str, object]:
    return json.loads((model_path() / name).read_text(encoding="utf-8"))


def test_the_package_names_its_folder_without_heavy_imports() -> None:
    import subprocess
    import sys

    program = (
        "import sys, layerscope.demo as demo; print(demo.model_path());"
        "sys.exit(int(bool({'torch', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == model_path()


@needs_weights
def test_folder_is_complete_and_small() -> None:
    sizes = {name: (model_path() / name).stat().st_size for name in FILES}
    assert sum(sizes.values()) < 12_000_000


@needs_weights
def test_weights_are_stored_as_float16_and_load_as_float32() -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with safe_open(model_path() / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(str(model_path()))
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


@needs_weights
def test_tokenizer_round_trip_and_one_bos() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path()))
    for text in ("The capital of Peru is Lima.", "hot -> cold\nniño -> boy\n", "a  b , c", "☃ é"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    for city in ("Berlin", "Paris", "Rome", "Tokyo", "Ottawa"):
        assert len(tokenizer(f" {city}", add_special_tokens=False)["input_ids"]) == 1


@needs_weights
def test_builtin_prompts_are_answered_right() -> None:
    model, tokenizer = load(model_path())
    score = score_groups(model, tokenizer, facts.suite_items())["all"]
    assert score == {"items": 10, "top1": 1.0, "full": 1.0}


@needs_weights
def test_evaluation_meets_the_goals() -> None:
    goals = read("evaluation.json")["goals"]
    assert isinstance(goals, dict)
    assert {name: goal["wanted"] for name, goal in goals.items()} == GOALS
    missed = {name: goal for name, goal in goals.items() if goal["measured"] < goal["wanted"]}
    assert missed == {}


@needs_weights
def test_card_repeats_the_measurements() -> None:
    from layerscope.demo.card import card_text

    card = (model_path() / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card == card_text(model_path(), read("training.json"), read("evaluation.json"))
