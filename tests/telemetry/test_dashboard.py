"""The dashboard's definition, and pushing it to a server that records what it gets."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ouro_megatron.errors import DashboardError, MetricsError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.telemetry.dashboard import facts_of, write_dashboard
from ouro_megatron.telemetry.metric_names import metrics_of
from ouro_megatron.telemetry.records import RankSpread
from tests.telemetry.test_metrics_file import evaluation, step, write
from tests.tiny import tiny_recipe

OURO = Path(sys.executable).with_name("ouro")


def recipe_file(folder: Path, name: str = "1-stable") -> Path:
    recipe = tiny_recipe(folder / "data", name=name, run_dir=str(folder / "demo"))
    path = folder / "demo" / name / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(recipe))
    return path


def panels_of(definition: dict[str, Any]) -> list[dict[str, Any]]:
    sections = definition["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def test_panels_ask_for_metrics_that_runs_log(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    said = write_dashboard(path, None, entity="team", project=None, push=False)
    definition = json.loads(Path(said).read_text())
    assert (definition["entity"], definition["project"]) == ("team", "ouro-megatron")
    logged = {
        *metrics_of(step(1, mfu=0.5, source_share={"train": 1.0}, ranks=_spread(), system=_system())),
        *metrics_of(evaluation(1)),
    }
    wanted = {metric for panel in panels_of(definition) for metric in panel.get("metrics", [])}
    assert wanted <= logged
    for needed in ("loss/loop_3", "exit/p_3", "exit/expected_depth", "perf/mfu", "data/source_share/train"):
        assert needed in wanted
    assert all(panel["xAxis"] == "progress/tokens" for panel in panels_of(definition))
    gains = [expression for panel in panels_of(definition) for expression in panel.get("expressions", [])]
    assert gains == ["${held_out/loop_1} - ${held_out/loop_2}", "${held_out/loop_2} - ${held_out/loop_3}"]


def _spread() -> RankSpread:
    return RankSpread(1.0, 1.5, slowest_rank=1, straggler_rank=1, straggler_ratio=1.5, straggler_excess=0.5)


def _system() -> dict[str, float]:
    from ouro_megatron.telemetry.system import system_numbers

    return system_numbers(Path("/"), device_bytes=10**9)


def test_a_pipeline_shows_the_groups_of_its_stages(tmp_path: Path) -> None:
    for name in ("1-stable", "2-anneal"):
        recipe_file(tmp_path, name)
        write(tmp_path / "demo" / name, [step(1)])
    facts = facts_of(tmp_path / "demo")
    assert set(facts.groups) == {"demo/1-stable", "demo/2-anneal"} and facts.loops == 3
    said = write_dashboard(tmp_path / "demo", None, entity=None, project="mine", push=False)
    assert said == str(tmp_path / "demo" / "dashboard.json")
    (runs,) = json.loads(Path(said).read_text())["spec"]["section"]["runSets"]
    assert set(runs["filters"]["filters"][0]["value"]) == set(facts.groups)


def test_the_shipped_pipeline_before_it_has_run(tmp_path: Path) -> None:
    stages = Path(__file__).resolve().parents[2] / "stages"
    out = tmp_path / "dashboard.json"
    words = [str(OURO), "dashboard", str(stages / "ouro-2.6b"), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    definition = json.loads(out.read_text())
    (runs,) = definition["spec"]["section"]["runSets"]
    groups = runs["filters"]["filters"][0]["value"]
    assert groups[:3] == ["ouro/1-warmup", "ouro/2-stable-1", "ouro/2.6b-4-stable-2"] and len(groups) == 8
    wanted = {metric for panel in panels_of(definition) for metric in panel.get("metrics", [])}
    assert {"loss/loop_8", "data/source_share/replay/nemotron-cc", "data/source_share/sft-chat"} <= wanted
    assert facts_of(stages / "ouro" / "2-stable-1.yaml").loops == 8, "it begins with more loops than it ends with"


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(MetricsError):
        write_dashboard(tmp_path, None, entity=None, project=None, push=False)
    path = recipe_file(tmp_path)
    with pytest.raises(DashboardError, match="--entity"):
        write_dashboard(path, tmp_path / "out.json", entity=None, project=None, push=True)
    with pytest.raises(DashboardError, match="cannot be written"):
        write_dashboard(path, Path("/proc/nowhere/out.json"), entity=None, project=None, push=False)


class Server(BaseHTTPRequestHandler):
    """Answers GraphQL as W&B does, as far as pushing a workspace asks; keeps what was pushed."""

    pushed: list[dict[str, Any]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data: dict[str, Any] = {"viewer": {"id": "1", "username": "me", "entity": "team", "flags": "{}", "teams": {}}}
        if "UpsertView2" in body["query"]:
            type(self).pushed.append(body["variables"])
            data = {"upsertView": {"view": {"id": "abc", "name": "nw-abc-v"}, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: Any) -> None:
        pass


def test_push_sends_what_the_file_holds(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        result = _push(path, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    finally:
        server.shutdown()
    assert result.returncode == 0, result.stdout + result.stderr
    (pushed,) = Server.pushed
    assert (pushed["entityName"], pushed["projectName"]) == ("team", "ouro-megatron")
    assert json.loads(pushed["spec"]) == json.loads((path.parent / "recipe.dashboard.json").read_text())["spec"]


def test_an_unreachable_server_is_one_error(tmp_path: Path) -> None:
    result = _push(recipe_file(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    assert result.returncode == 6
    assert "did not take the dashboard" in result.stderr and "Traceback" not in result.stderr


def _push(path: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [OURO, "dashboard", path, "--push", "--entity", "team"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
