"""A few seeds of the fault suite in every test run; all of them: python -m tests.faults.run --runs 100."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.cases import DAMAGES, PLACES, draw

ROOT = Path(__file__).resolve().parents[2]


def test_a_hundred_seeds_cover_every_kind_and_nearly_every_place() -> None:
    cases = [draw(seed) for seed in range(100)]
    assert cases == [draw(seed) for seed in range(100)]
    faults = [fault for case in cases for fault in case.faults]
    kinds = Counter(fault.kind for fault in faults) + Counter(case.bad_data for case in cases)
    for kind in (
        *("kill", "term", "disk full", "not finite", "spike", "corrupt checkpoint", "corrupt data", "clock"),
        *("wandb gone", "slow rank", "frozen rank", "kill command"),
    ):
        assert kinds[kind] >= 1, kind
    assert {fault.place for fault in faults if fault.kind == "kill"} == set(PLACES)
    assert {fault.detail for fault in faults if fault.kind == "corrupt checkpoint"} == set(DAMAGES)
    assert {case.layout for case in cases} == {"tensor", "pipeline", "data"}


@pytest.mark.slow
@pytest.mark.distributed
def test_some_seeds(tmp_path: Path) -> None:
    wanted = {"kill": 2, "term": 1, "corrupt checkpoint": 1, "spike": 1, "clock": 1}
    seeds = []
    for seed in range(100):
        case = draw(seed)
        kind = case.bad_data or case.faults[0].kind
        if wanted.get(kind, 0):
            wanted[kind] -= 1
            seeds.append(str(seed))
    result = subprocess.run(
        [sys.executable, "-m", "tests.faults.run", "--seeds", ",".join(seeds), "--out", str(tmp_path / "out.jsonl")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(seeds)} of {len(seeds)} runs kept every promise" in result.stdout
