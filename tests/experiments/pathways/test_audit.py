"""One fixture per class of fault: each is found, named with file and record, and nothing raises."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from layerscope.experiments.pathways.audit import Audit, Universe, audit
from layerscope.experiments.pathways.config import CONDITIONS, PathwaysConfig
from support.pathways_data import WORDS, checkpoint, log, responses, result

SPACE = "toy:resid_post"
UNIVERSE = Universe(SPACE, {1: 64, 2: 64}, 16, "models/toy")
FEATURES = ("L1-20", "L2-30")


def good(folder: Path) -> Path:
    """Write data without any fault."""
    checkpoint(folder, [result(1, 20, 0.9), result(2, 30, -1.4)], space=SPACE, model="toy")
    log(folder, responses(FEATURES))
    return folder


def look(folder: Path, **options: Any) -> Audit:
    config = PathwaysConfig(data=str(folder), model="toy", dictionaries="d", **options)
    return audit(config, UNIVERSE)


def codes(found: Audit, severity: str = "error") -> dict[str, dict[str, Any]]:
    return {each["code"]: each for each in found.findings.of(severity)}  # type: ignore[arg-type]


def test_the_real_schema_passes_and_is_counted(tmp_path: Path) -> None:
    found = look(good(tmp_path))
    assert found.findings.exit_code == 0, found.to_dict()
    assert found.counts["checkpoints"]["causal_by_layer"] == {"1": 1, "2": 1}
    assert found.counts["responses"]["records"] == 2 * 6 * 20
    assert found.counts["responses"]["conditions"] == dict.fromkeys(CONDITIONS, 40)
    assert found.counts["join"]["coverage_of_causal"] == 1.0
    assert found.features["cohen_d"].to_list() == [0.9, -1.4]
    assert found.features["safe_effect_size"].to_list() == [0.3, 0.3]


def test_the_plans_own_schema_passes(tmp_path: Path) -> None:
    plain = {"feature": "L1-20", "layer": 1, "feature_id": 20, "is_causal": True, "cohen_d": 0.5}
    name = "comprehensive_patching_checkpoint_3.json"
    checkpoint(tmp_path, [plain], name=name, space=SPACE)
    aliased = [
        "safe_baseline",
        "safe_with_risky_patch",
        "risky_baseline",
        "risky_with_safe_patch",
        "safe_amplification",
        "risky_amplification",
    ]
    log(tmp_path, responses(["L1-20"], conditions=aliased), name="response_logs/a.json")
    found = look(tmp_path)
    assert found.findings.exit_code == 0, found.to_dict()
    assert found.features["side"].to_list() == ["unclear"]


def test_no_files_at_all_gives_the_same_schema(tmp_path: Path) -> None:
    empty = look(tmp_path)
    assert set(codes(empty)) == {"no_checkpoints", "no_responses"}
    (tmp_path / "full").mkdir()
    full = look(good(tmp_path / "full"))
    assert set(empty.to_dict()) == set(full.to_dict())
    assert not empty.to_dict()["validated"]


def test_a_truncated_checkpoint_is_named_and_the_others_are_audited(tmp_path: Path) -> None:
    good(tmp_path)
    broken = tmp_path / "checkpoint_L9_9_1_20251112_000000.json"
    whole = json.dumps({"timestamp": "x", "results": [result(1, 21), result(1, 22)]})
    broken.write_text(whole[: whole.index("L1-22") + 20])
    found = look(tmp_path)
    example = codes(found)["unreadable_json"]["examples"][0]
    assert example["file"] == broken.name
    assert whole[: example["byte"]].count('"feature"') == 1  # the offset of the cut record
    # The whole record before the cut counts, and so does the other file.
    assert found.counts["checkpoints"]["unique_features"] == 3


def test_a_truncated_response_log_is_named(tmp_path: Path) -> None:
    good(tmp_path)
    broken = tmp_path / "responses_L8_8_1_20251112_000000.json"
    broken.write_text(json.dumps(responses(["L1-20"], trials=1))[:-40])
    assert codes(look(tmp_path))["unreadable_json"]["examples"][0]["file"] == broken.name


@pytest.mark.parametrize("field", ["feature", "layer", "feature_id", "cohen_d", "causality"])
def test_a_missing_field_is_an_error_with_its_record(tmp_path: Path, field: str) -> None:
    good(tmp_path)
    records = [result(1, 25), result(1, 26), result(1, 27)]
    for record in records[1:]:
        del record[field]
    checkpoint(tmp_path, records, name="checkpoint_L3.json", space=SPACE)
    error = codes(look(tmp_path))["missing_field"]
    assert error["count"] == 2
    assert [example["record"] for example in error["examples"]] == [1, 2]
    assert ("is_causal" if field == "causality" else field) in error["message"]


def test_offenders_are_all_counted_and_twenty_listed(tmp_path: Path) -> None:
    good(tmp_path)
    records = [{"layer": 1, "feature_id": n, "is_causal": True, "cohen_d": 1} for n in range(33)]
    checkpoint(tmp_path, records, name="checkpoint_L3.json", space=SPACE)
    error = codes(look(tmp_path))["missing_field"]
    assert (error["count"], len(error["examples"])) == (33, 20)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (result(1, 20, feature="L1-21"), "wrong_id"),
        (result(1, 64), "id_out_of_range"),
        (result(1, -1), "id_out_of_range"),
        (result(7, 3), "layer_out_of_range"),
        (result(1, 20, feature_id="twenty"), "bad_id"),
        (result(1, 20, cohen_d="large"), "bad_effect"),
        (result(1, 20, is_causal=float("nan")), "bad_verdict"),
        (result(1, 20, space="other:resid_post"), "other_space"),
        ("L1-20", "not_a_record"),
    ],
)
def test_wrong_records_are_errors(tmp_path: Path, record: Any, code: str) -> None:
    good(tmp_path)
    checkpoint(tmp_path, [record], name="checkpoint_L3.json", space=SPACE)
    error = codes(look(tmp_path))[code]
    assert error["examples"][0]["file"] == "checkpoint_L3.json"
    assert error["examples"][0]["record"] == 0


def test_residual_coordinates_posing_as_features_are_noticed(tmp_path: Path) -> None:
    # Sixteen ids, all below d_model = 16 of 64 features: chance is 4 ** -16.
    checkpoint(tmp_path, [result(1, n) for n in range(16)])
    log(tmp_path, responses([f"L1-{n}" for n in range(16)]))
    warning = codes(look(tmp_path), "warning")["residual_coordinates"]
    assert warning["examples"][0] == {"largest_id": 15, "d_model": 16}
    # One id beyond the width, and the suspicion is gone.
    checkpoint(tmp_path, [result(1, n) for n in range(15)] + [result(1, 40)])
    assert "residual_coordinates" not in codes(look(tmp_path), "warning")


def test_ids_without_a_space_are_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, 20), result(2, 30)])
    log(tmp_path, responses(FEATURES))
    found = look(tmp_path)
    assert codes(found, "warning")["no_space"]["count"] == 2
    assert found.findings.exit_code == 1
    assert found.features["space"].to_list() == [SPACE, SPACE]


def test_cumulative_checkpoints_count_once_and_the_newest_verdict_stays(tmp_path: Path) -> None:
    good(tmp_path)
    later = [result(1, 20, 0.9), result(2, 30, -1.4), result(2, 31, 0.2)]
    checkpoint(
        tmp_path, later, name="checkpoint_L1_b.json", space=SPACE, timestamp="2025-11-12T00:00:00"
    )
    found = look(tmp_path)
    assert found.findings.exit_code == 0
    assert found.counts["checkpoints"] | {"causal_by_layer": {}, "causal_by_side": {}} == {
        "records": 5,
        "unique_features": 3,
        "duplicates": 2,
        "causal_features": 3,
        "causal_by_layer": {},
        "causal_by_side": {},
    }


@pytest.mark.parametrize(("policy", "severity"), [("newest", "warning"), ("error", "error")])
def test_conflicting_duplicates(tmp_path: Path, policy: str, severity: str) -> None:
    good(tmp_path)
    earlier = result(1, 20, 5.0)
    checkpoint(
        tmp_path,
        [earlier],
        name="checkpoint_L1_z.json",
        space=SPACE,
        timestamp="2025-11-10T00:00:00",
    )
    found = look(tmp_path, duplicates=policy)
    example = codes(found, severity)["conflicting_duplicates"]["examples"][0]
    assert example["feature"] == "L1-20"
    kept = found.features.filter(found.features["feature"] == "L1-20")
    assert kept["cohen_d"].to_list() == [0.9]  # the later file, although read first


def test_an_undefined_effect_is_a_warning(tmp_path: Path) -> None:
    good(tmp_path)
    checkpoint(tmp_path, [result(1, 22, float("nan"))], name="checkpoint_L3.json", space=SPACE)
    assert codes(look(tmp_path), "warning")["undefined_effect"]["count"] == 1


def test_a_missing_condition_is_an_error_and_an_unknown_one_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, 20), result(2, 30)], space=SPACE)
    names = [*CONDITIONS[:-1], "greedy_patch"]
    log(tmp_path, responses(FEATURES, conditions=names))
    found = look(tmp_path)
    assert CONDITIONS[-1] in codes(found)["missing_condition"]["message"]
    assert codes(found, "warning")["unknown_condition"]["count"] == 40


def test_a_feature_without_one_condition_is_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, 20), result(2, 30)], space=SPACE)
    some = responses(["L2-30"], conditions=CONDITIONS[:-1])
    log(tmp_path, [*responses(["L1-20"]), *some])
    warning = codes(look(tmp_path), "warning")["incomplete_conditions"]
    assert warning["examples"][0]["features"] == {"L2-30": [CONDITIONS[-1]]}


def test_shared_baselines_count_for_every_feature(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, 20), result(2, 30)], space=SPACE)
    baselines = [name for name in CONDITIONS if name.endswith("baseline")]
    patched = [name for name in CONDITIONS if not name.endswith("baseline")]
    shared = responses(["baseline"], conditions=baselines)
    log(tmp_path, [*shared, *responses(FEATURES, conditions=patched)])
    assert look(tmp_path).findings.exit_code == 0


def test_one_empty_response_warns_and_many_fail(tmp_path: Path) -> None:
    good(tmp_path)
    records = responses(FEATURES)
    records[3]["response"] = "  "
    path = log(tmp_path, records)
    warning = codes(look(tmp_path), "warning")["empty_response"]
    assert warning["examples"] == [{"file": path.name, "record": 3}]
    for record in records[:10]:
        record["response"] = ""
    log(tmp_path, records)
    assert codes(look(tmp_path))["many_empty_responses"]["count"] == 10


def test_a_response_without_its_fields_is_an_error(tmp_path: Path) -> None:
    good(tmp_path)
    records: list[Any] = responses(FEATURES)
    del records[5]["condition"]
    records[7] = None
    log(tmp_path, records)
    found = codes(look(tmp_path))
    assert found["missing_field"]["examples"][0]["record"] == 5
    assert found["not_a_record"]["examples"][0]["record"] == 7


def test_few_trials_of_any_feature_are_a_warning(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, 20), result(2, 30)], space=SPACE)
    log(tmp_path, [*responses(["L1-20"], trials=20), *responses(["L2-30"], trials=7)])
    warning = codes(look(tmp_path), "warning")["few_trials"]
    assert warning["examples"][0]["worst"] == {"L2-30": 7}


def test_greedy_copies_are_no_sample(tmp_path: Path) -> None:
    good(tmp_path)
    records = responses(FEATURES)
    for record in records:
        record["response"] = f"{record['condition']} {record['feature']}"
    log(tmp_path, records)
    warnings = codes(look(tmp_path), "warning")
    assert warnings["copied_responses"]["count"] == 12
    assert warnings["copied_responses"]["examples"][0]["worst"][0]["unique_share"] == 0.05
    assert warnings["unvaried_responses"]["count"] == 2
    # A few long texts are copies too, however often each of them occurs elsewhere.
    for record in records:
        record["response"] = f"I think for a while about what to do next, and then I {WORDS[0]}"
        record["response"] += " again" * (record["trial"] % 3)
    log(tmp_path, records)
    assert set(codes(look(tmp_path), "warning")) == {"unvaried_responses"}


@pytest.mark.parametrize("seed", range(3))
def test_short_answers_repeat_by_chance(tmp_path: Path, seed: int) -> None:
    """Three possible texts, some near certain under an edit: samples all the same."""
    good(tmp_path)
    random = Random(seed)
    records = responses(FEATURES, trials=50)
    for record in records:
        odds = [90, 8, 2] if record["condition"].startswith("safe") else [40, 50, 10]
        if record["condition"] == "risky_with_safe_patch":
            odds = [100, 0, 0]
        record["response"] = random.choices(["2) stop", "1) bet $10", "1) bet $20"], odds)[0]
    log(tmp_path, records)
    assert not codes(look(tmp_path), "warning")
    copied = [r for r in records if r["feature"] == "L1-20" and r["condition"] == "safe_baseline"]
    for record in copied:  # one cell among good ones
        record["response"] = "I stop here."
    log(tmp_path, records)
    found = codes(look(tmp_path), "warning")
    assert set(found) == {"copied_responses"} and found["copied_responses"]["count"] == 1


def test_repeated_trials_are_counted_once(tmp_path: Path) -> None:
    good(tmp_path)
    log(tmp_path, responses(FEATURES), name="responses_L1_copy.json")
    found = look(tmp_path)
    assert codes(found, "warning")["repeated_trials"]["count"] == 240
    assert found.counts["responses"]["records"] == 240


def test_a_low_parse_rate_is_a_warning(tmp_path: Path) -> None:
    good(tmp_path)
    records = responses(FEATURES)
    for record in records[:100]:
        record["parsed"]["valid"] = False
    log(tmp_path, records)
    assert codes(look(tmp_path), "warning")["low_parse_rate"]["count"] == 100


def test_features_without_responses_fail_the_join(tmp_path: Path) -> None:
    checkpoint(tmp_path, [result(1, n) for n in (20, 21, 22)], space=SPACE)
    log(tmp_path, responses(["L1-20", "L2-63"]))
    found = look(tmp_path)
    error = codes(found)["low_coverage"]
    assert error["examples"][0]["missing"] == ["L1-21", "L1-22"]
    assert codes(found, "warning")["unknown_features"]["examples"][0]["features"] == ["L2-63"]


def test_data_of_another_model_is_an_error_unless_allowed(tmp_path: Path) -> None:
    good(tmp_path)
    checkpoint(tmp_path, [result(1, 23)], name="checkpoint_L3.json", space=SPACE, model="Other")
    assert codes(look(tmp_path))["other_model"]["examples"][0]["model"] == "Other"
    assert "other_model" in codes(look(tmp_path, allow_mismatch=True), "warning")


def test_a_sample_is_seeded_sorted_and_stamped(tmp_path: Path) -> None:
    good(tmp_path)
    for n in range(6):
        log(tmp_path, responses(FEATURES), name=f"responses_L1_{n}.json")
    first, again = (look(tmp_path, sample=2, seed=3).to_dict() for _ in range(2))
    assert first["sampled"] and first["files"]["responses"] == {"found": 7, "read": 2}
    assert first == again
    assert not look(tmp_path).to_dict()["sampled"]
