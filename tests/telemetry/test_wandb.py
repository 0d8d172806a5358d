"""Weights & Biases may be absent, unreachable or broken: one warning, and the run goes on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.wandb_sink import WandbSink, metrics_of
from tests.telemetry.test_metrics_file import evaluation, info, step

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, mode: str, before: str = "", **environment: str) -> list[str]:
    """Starts, writes and closes the sink in a process of its own; returns what it had to say."""
    code = f"""
import sys
from pathlib import Path
{before}
from tests.telemetry.test_metrics_file import evaluation, info, step
from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.wandb_sink import WandbSink
sink = WandbSink(WandbSection(mode={mode!r}), lambda name, message: print("SAID", name, message))
sink.start(info(Path({str(folder)!r})))
for number in range(1, 4):
    sink.write(step(number))
sink.write(evaluation(3))
sink.close(None)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("SAID")]


def test_names_are_grouped() -> None:
    values = metrics_of(step(2, mfu=0.3))
    assert values["loss/loop_3"] == 4.25 and values["exit/p_1"] == 0.5 and values["perf/mfu"] == 0.3
    assert metrics_of(evaluation(2))["held_out/loop_1"] == 5.0


def test_offline_writes_into_the_run_folder_and_is_silent(tmp_path: Path) -> None:
    assert run(tmp_path, "offline") == []
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 500
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    assert identity in files[0].name


@pytest.mark.slow
def test_unreachable_server_is_one_warning(tmp_path: Path) -> None:
    began = time.monotonic()
    said = run(tmp_path, "online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert len(said) == 1 and "Weights & Biases is off" in said[0]
    assert time.monotonic() - began < 90


def test_package_missing(tmp_path: Path) -> None:
    said = run(tmp_path, "offline", before="sys.modules['wandb'] = None")
    assert len(said) == 1 and "wandb" in said[0]


def test_disabled_does_nothing(tmp_path: Path) -> None:
    sink = WandbSink(WandbSection(mode="disabled"), lambda name, message: pytest.fail(message))
    sink.start(info(tmp_path))
    sink.write(step(1))
    sink.close(None)
    assert list(tmp_path.iterdir()) == []
