"""The console's plain lines, its live form, and what people read in them."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from ouro_megatron.telemetry.console import ConsoleSink
from ouro_megatron.telemetry.records import EventRecord
from ouro_megatron.telemetry.text import big, duration, per_loop
from tests.telemetry.test_metrics_file import evaluation, info, step


def lines(every: int, *, terminal: bool = False) -> str:
    output = io.StringIO()
    sink = ConsoleSink(every, Console(file=output, force_terminal=terminal, soft_wrap=True, highlight=False, width=200))
    sink.start(info(Path("runs/a [b]"), start=40, resumed=True))
    for number in range(41, 46):
        sink.write(step(number, skipped_steps=2, mfu=0.5))
    sink.write(evaluation(45))
    sink.write(EventRecord(45, "checkpoint", "saved [x]"))
    sink.close("the end")
    return output.getvalue()


def test_plain_lines() -> None:
    text = lines(2)
    assert "a run: 1M parameters on 1 cpu rank, 100 steps, going on from step 40; files in runs/a [b]" in text
    assert [line.split(" |")[0] for line in text.splitlines() if line.startswith("step ")] == [
        "step 42/100",
        "step 44/100",
    ]
    for words in ("by loop 5.000 4.500 4.250", "depth 1.75", "2k tok/s", "MFU 50.0%", "ETA 28s", "skipped 2"):
        assert words in text
    for words in ("held out at step 45: loss 4.8000", "checkpoint: saved [x]", "45/100 steps done", "the end"):
        assert words in text


def test_live_form_in_a_terminal() -> None:
    text = lines(1, terminal=True)
    assert "held out at step 45" in text and "45/100 steps done" in text


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1234, "1.23k"), (2.6e9, "2.6B"), (3e12, "3T")])
def test_big(number: float, text: str) -> None:
    assert big(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(59, "59s"), (75, "1m 15s"), (3700, "1h 01m"), (93_784, "1d 2h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_many_loops_are_shortened() -> None:
    assert per_loop([float(n) for n in range(1, 9)]) == "1.000 2.000 3.000 .. 7.000 8.000"
