"""Weights & Biases may be absent, unreachable or broken: one warning, and the run goes on."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.metric_names import metrics_of
from ouro_megatron.telemetry.wandb_sink import WandbSink
from tests.telemetry.test_metrics_file import evaluation, info, step

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, mode: str, before: str = "", between: str = "", **environment: str) -> list[str]:
    """Starts, writes and closes the sink in a process of its own; returns what it had to say."""
    code = f"""
import dataclasses
import sys
from pathlib import Path
{before}
from tests.telemetry.test_metrics_file import evaluation, info, step
from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.wandb_sink import WandbSink
sink = WandbSink(WandbSection(mode={mode!r}), lambda name, message: print("SAID", name, message))
about = info(Path({str(folder)!r}), resumed=(Path({str(folder)!r}) / "wandb-attempts.json").exists())
lineage = [dict(name="1-stable", kind="training", tokens=5)]
sink.start(dataclasses.replace(about, pipeline="demo", lineage=lineage, git=dict(commit="abc")))
for number in range(1, 4):
    sink.write(step(number, source_share=dict(web=0.75, code=0.25), system=dict(cpu_share=0.5)))
{between}
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
    values = metrics_of(step(2, mfu=0.3, source_share={"web": 0.75}, system={"cpu_share": 0.5}, rollbacks=1))
    expected = {
        "loss/loop_3": 4.25,
        "exit/p_1": 0.5,
        "exit/expected_depth": 1.75,
        "exit/entropy": 1.04,
        "perf/mfu": 0.3,
        "perf/tokens_per_s": 2000.0,
        "optim/rollbacks": 1,
        "data/source_share/web": 0.75,
        "system/cpu_share": 0.5,
        "progress/tokens": 2000,
    }
    assert {name: values[name] for name in expected} == expected
    assert metrics_of(evaluation(2))["held_out/loop_1"] == 5.0


def stored(file: Path) -> Iterator[Any]:
    """The records of an offline run: protobuf messages in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block too short for a header is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_offline_files_hold_group_attempt_config_and_metrics(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "recipe.yaml").write_text(f"name: a run\n# as of attempt {number}")
        assert run(tmp_path, "offline") == []
    attempts = json.loads((tmp_path / "wandb-attempts.json").read_text())
    assert len({attempt["id"] for attempt in attempts}) == 2
    for number, attempt in enumerate(attempts, start=1):
        (file,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{attempt['id']}.wandb")
        records = list(stored(file))
        (opened,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (opened.run_group, opened.job_type) == ("demo/a run", "a run")
        assert opened.display_name == f"a run attempt {number}"
        config = {item.key: json.loads(item.value_json) for item in opened.config.update}
        assert config["attempt"] == number and config["git"] == {"commit": "abc"}
        assert config["lineage"][0]["name"] == "1-stable" and config["model"] == {"layers": 2}
        rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
        names = {"/".join(item.nested_key) or item.key for item in rows[0].item}
        assert {"loss/loop_1", "exit/p_1", "data/source_share/web", "optim/lr", "system/cpu_share"} <= names
        assert len(rows) == 4
        saved = [f.path for r in records if r.WhichOneof("record_type") == "files" for f in r.files.files]
        assert "recipe.yaml" in saved
        assert f"attempt {number}" in (file.parent / "files" / "recipe.yaml").read_text(), "not what a later one wrote"


KILL_SERVICE = """
import psutil, time
for child in psutil.Process().children(recursive=True):
    if "wandb" in " ".join(child.cmdline()):
        child.kill()
time.sleep(0.5)
for number in range(4, 3000):
    sink.write(step(number))
"""


def test_a_service_that_is_killed_is_at_most_one_warning_and_no_stall(tmp_path: Path) -> None:
    began = time.monotonic()
    said = run(tmp_path, "offline", between=KILL_SERVICE)
    assert len(said) <= 1 and all("Weights & Biases is off" in line for line in said)
    assert time.monotonic() - began < 110


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
