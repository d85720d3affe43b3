"""A short run of the fuzz of model files; `python -m tests.fuzz.model_files` runs for as long as it
is told."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.model_files import Fuzz, make_case

SEED, CASES = 3, 30


def test_whatever_lies_in_a_model_file_there_is_a_picture_or_a_reason(tmp_path: Path) -> None:
    fuzz = Fuzz(tmp_path)
    outcomes = {number: fuzz.try_case(make_case(SEED, number)) for number in range(CASES)}
    assert {number: one.fault for number, one in outcomes.items() if one.fault} == {}
    assert any(not one.registry and not one.worker for one in outcomes.values())
    assert any(one.registry for one in outcomes.values())
    assert any(not one.registry and one.worker for one in outcomes.values())
