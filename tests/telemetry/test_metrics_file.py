"""metrics.jsonl: what is written comes back, a cut line does no harm, a full disk does not stop a run."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_megatron.errors import MetricsError
from ouro_megatron.telemetry.metrics_file import MetricsFile, drop_after, from_line, read_records, to_line
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, LoopStats, Record, StepRecord
from ouro_megatron.telemetry.sink import RunInfo, Sinks

LOOPS = LoopStats(ce=[5.0, 4.5, 4.25], exit_probability=[0.5, 0.25, 0.25], entropy=1.04, expected_depth=1.75)


def step(number: int, **changes: object) -> StepRecord:
    record = StepRecord(
        step=number,
        total_steps=100,
        tokens=number * 1000,
        total_tokens=100_000,
        loss=5.0 - number / 100,
        loops=LOOPS,
        grad_norm=1.0,
        lr=1e-3,
        global_tokens=1000,
        seconds=0.5,
        tokens_per_second=2000.0,
        mfu=None,
        skipped=False,
        skipped_steps=0,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def evaluation(number: int) -> EvalRecord:
    return EvalRecord(step=number, tokens=number * 1000, loss=4.8, loops=LOOPS, batches=2)


def info(folder: Path, start: int = 0, *, resumed: bool = False) -> RunInfo:
    return RunInfo("a run", folder, {"model": {"layers": 2}}, "1 cpu rank", 1_000_000, start, 100, resumed)


def test_round_trip() -> None:
    for record in (step(3, mfu=0.41), evaluation(3), EventRecord(3, "checkpoint", "saved ü")):
        assert from_line(to_line(record)) == record


def test_not_finite_numbers_round_trip_as_json() -> None:
    line = to_line(step(1, loss=math.nan, grad_norm=math.inf, loops=dataclasses.replace(LOOPS, ce=[-math.inf])))
    assert "NaN" in line and '"Infinity"' in line
    back = from_line(line)
    assert isinstance(back, StepRecord)
    assert math.isnan(back.loss) and back.grad_norm == math.inf and back.loops.ce == [-math.inf]


def write(folder: Path, records: list[Record], start: int = 0, *, resumed: bool = False) -> Path:
    sinks = Sinks()
    sinks.add(MetricsFile(sinks.notify))
    sinks.start(info(folder, start, resumed=resumed))
    for record in records:
        sinks.write(record)
    sinks.close()
    return folder / "metrics.jsonl"


def test_cut_last_line_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, [step(1), step(2)])
    path.write_bytes(path.read_bytes()[:-20])
    assert read_records(path) == [step(1)]


def test_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [step(1), step(2)])
    path.write_text(path.read_text().replace('"step": 1', '"stop": 1', 1))
    with pytest.raises(MetricsError, match="line 1"):
        read_records(path)


def test_resume_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [step(1), step(2), evaluation(2), step(3), EventRecord(3, "x", "y")])
    path = write(tmp_path, [step(3, loss=1.0)], start=2, resumed=True)
    assert read_records(path) == [step(1), step(2), evaluation(2), step(3, loss=1.0)]
    drop_after(path, 1)
    assert read_records(path) == [step(1)]


def test_a_fresh_start_keeps_the_old_file_aside(tmp_path: Path) -> None:
    write(tmp_path, [step(1)])
    path = write(tmp_path, [step(1, loss=2.0)])
    assert read_records(path) == [step(1, loss=2.0)]
    assert read_records(tmp_path / "metrics.previous.jsonl") == [step(1)]


def test_full_disk_leaves_no_half_line_and_goes_on(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from tests.telemetry.test_metrics_file import step, info
from ouro_megatron.telemetry.metrics_file import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
said = []
sink = MetricsFile(lambda name, message: said.append(message))
sink.start(info(Path({str(tmp_path)!r})))
for number in range(1, 10):
    sink.write(step(number))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.write(step(10))
sink.close(None)
assert len(said) == 1, said
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
    steps = [record.step for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps[0] == 1 and steps[-1] == 10 and 2 <= len(steps) < 10
