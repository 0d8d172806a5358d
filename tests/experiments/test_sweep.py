"""Real sweeps of tiny cells through the command: end to end, killed and gone on with, failing, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

OURO = Path(sys.executable).with_name("ouro")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write_settings(folder: Path, **over: object) -> Path:
    values = {
        "title": "A small sweep",
        "task": {"kind": "mano", "operations": 2, "modulus": 3},
        "examples": 2000,
        "test_examples": 40,
        "shapes": ["1x1", "1x2"],
        "seeds": 1,
        "beside": {"1x2": "2x6"},
        "claims": [{"kind": "above", "first": "1x2", "second": "1x1", "metric": "accuracy l=2", "margin": 5}],
        "recipe": {
            "model": {"hidden": 16, "heads": 2, "ffn": 32, "gate_bias_init": -20},
            "data": {"packing": "in_order", "sequence_length": 32},
            "objective": {"kind": "last_loop"},
            "optimizer": {"lr": 3e-3},
            "schedule": {"kind": "cosine", "warmup": "4 steps"},
            "batch": {"global_tokens": 128, "microbatch": 4},
            "budget": {"total": "12 steps"},
            "precision": {"compute": "fp32"},
            "training": {"device": "cpu"},
            "checkpoint": {"every": "5 steps"},
            "evaluation": {"every": "6 steps", "batches": 1},
            "logging": {"wandb": {"mode": "disabled"}},
        },
        **over,
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def command(settings: Path, out: Path, *words: str) -> list[str]:
    return [str(OURO), "experiment", "mano", "--scale", str(settings), "--out", str(out), *words]


def ouro(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False)


def wait_for(condition: object, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def steps_of(out: Path, cell: str) -> list[int]:
    file = out / "cells" / cell / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [record["step"] for record in records if record["kind"] == "step"]


def test_a_sweep_end_to_end_and_once_more(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ouro(*command(write_settings(tmp_path), out, "--jobs", "2"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "1⊗2, seed 1: accuracy l=2" in done.stdout and "1⊗2 is above 1⊗1 at equal parameters" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert summary["missing_cells"] == 0 and set(summary["results"]) == {"1x1", "1x2"}
    cell = summary["results"]["1x2"][0]
    assert cell["steps"] == 12 and cell["tokens"] == 12 * 128 and 0 <= cell["metrics"]["accuracy l=2"] <= 100
    assert summary["claims"][0]["verdict"] == "not clear" and "(one seed)" in summary["claims"][0]["sentence"]
    assert summary["data"][0]["overlap"] == 0
    page = (out / "summary.md").read_text()
    assert "| 1⊗2 | 1 |" in page and "| 2⊗6: 98.1 / 96.3 / 78 |" in page and "![curves.png](curves.png)" in page
    assert "| 3⊗4 | 97.9 | 95.8 | 92.2 |" in page
    assert (out / "summary.html").read_text().count("<img") == 2
    assert (out / "curves.png").stat().st_size > 5000 and (out / "accuracy.png").stat().st_size > 5000

    # More seeds: what is done stays, the rest is added. Then only the summary.
    before = (out / "cells" / "1x1-seed1" / "result.json").stat().st_mtime_ns
    more = ouro(*command(tmp_path / "settings.yaml", out, "--seeds", "2", "--cells", "1x1"))
    assert more.returncode == 0 and "2 runs, 1 done before" in more.stdout, more.stderr
    assert (out / "cells" / "1x1-seed1" / "result.json").stat().st_mtime_ns == before
    assert (out / "cells" / "1x1-seed2" / "result.json").exists()
    assert len(json.loads((out / "summary.json").read_text())["results"]["1x1"]) == 2
    other = write_settings(tmp_path, examples=2001)
    refused = ouro(*command(other, out))
    assert refused.returncode == 2 and "holds another experiment: examples differ" in refused.stderr


@pytest.mark.slow
def test_killed_with_nine_it_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    values = yaml.safe_load(settings.read_text())
    values["shapes"], values["claims"] = ["1x2"], []
    values["recipe"]["budget"]["total"] = "400 steps"
    values["recipe"]["checkpoint"]["every"] = "40 steps"
    settings.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    run = folder_of(out)
    first = subprocess.Popen(command(settings, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: any(run.glob("checkpoints/step-*/complete.json")))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    # The worker dies with the sweep: nothing holds the cell any more.
    wait_for(lambda: not is_held(out))
    assert not (run / "result.json").exists()
    saved = max(
        int(folder.name.split("-")[1])
        for folder in run.glob("checkpoints/step-*")
        if (folder / "complete.json").exists()
    )
    again = ouro(*command(settings, out))
    assert again.returncode == 0, again.stderr
    assert f"going on from step {saved}" in (out / "log" / "worker-0.log").read_text()
    assert steps_of(out, "1x2-seed1") == list(range(1, 401))


def folder_of(out: Path) -> Path:
    return out / "cells" / "1x2-seed1"


def is_held(out: Path) -> bool:
    """Whether a process still trains the cell: its run folder's lock is taken."""
    import fcntl

    with (folder_of(out) / ".lock").open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_a_stop_signal_saves_and_leaves(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    values = yaml.safe_load(settings.read_text())
    values["shapes"], values["claims"] = ["1x2"], []
    values["recipe"]["budget"]["total"] = "100000 steps"
    values["examples"] = 20_000
    settings.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    run = subprocess.Popen(command(settings, out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(steps_of(out, "1x2-seed1")) > 3)
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 75, text
    assert "run it again to go on" in text
    assert list(folder_of(out).glob("checkpoints/step-*/complete.json"))


def test_a_cell_that_fails_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    values = yaml.safe_load(settings.read_text())
    values["variants"] = [
        {"name": "good", "label": "good", "shapes": ["1x1"]},
        {"name": "bad", "label": "bad", "shapes": ["1x1"], "task": {"operations": 1}},
    ]
    values["shapes"], values["claims"], values["test_examples"] = ["1x1"], [], 27
    settings.write_text(yaml.safe_dump(values))  # all 27 expressions of one operation are tested: none is left
    out = tmp_path / "out"
    done = ouro(*command(settings, out))
    assert done.returncode == 5, done.stdout + done.stderr
    assert "1 of 2 cells are not done" in done.stderr and "1x1-bad-seed1" in done.stderr
    assert "fewer test_examples" in done.stderr
    assert json.loads((out / "summary.json").read_text())["missing_cells"] == 1
    assert (out / "cells" / "1x1-good-seed1" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "9x9"], "--cells 9x9: the cells here are 1x1, 1x2"),
        (["recipe.model.heads=3"], "model.hidden=16 is not a multiple of model.heads=3"),
        (["recipe.model.hiden=3"], "did you mean 'hidden'"),
        (["task.modulus=1"], "task.modulus"),
        (["--slurm"], "there is no sbatch on this machine"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from ouro_megatron.cli.main import app
    from ouro_megatron.errors import OuroError

    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, command(write_settings(tmp_path), out, *words)[1:])
    assert isinstance(result.exception, OuroError)
    assert message in str(result.exception)
    assert not (out / "cells").exists() and not (out / "data").exists()


def test_a_dry_run_shows_every_cell_and_writes_nothing(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ouro_megatron.cli.main import app

    out = tmp_path / "out"
    words = ["experiment", "mano", "--scale", "paper", "--out", str(out), "--dry-run", "--seeds", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "21 runs" in result.output and "in all" in result.output and "12x1" in result.output
    assert not out.exists()


def test_summary_of_an_empty_folder_is_refused(tmp_path: Path) -> None:
    done = ouro(str(OURO), "experiment", "summary", "--out", str(tmp_path))
    assert done.returncode == 2 and "no experiment there" in done.stderr
