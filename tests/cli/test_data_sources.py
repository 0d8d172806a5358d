"""`ouro data sources`, `fixtures`, `preview` and `index`, as a new user tries them."""

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from ouro_megatron.cli.main import app


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_sources_and_their_fields() -> None:
    assert "prolong" in run("sources")
    assert "Folder of the Llama-3 tokenizer" in " ".join(run("sources", "prolong").split())
    assert run("sources", "map_cc", "--recipe").startswith("# MAP-CC")


def test_from_fixture_to_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "small corpus"
    recipe = folder / "data.yaml"
    assert "ouro data prepare" in run("fixtures", "llama_nemotron", str(folder))
    shown = run("preview", str(recipe), "--count", "1")
    assert "2 units in 2 file(s)" in shown and "<think>" in shown and "assistant:" in shown
    run("prepare", str(recipe), "--workers", "1")
    run("verify", str(folder / "prepared" / "llama-nemotron"))
    assert (folder / "prepared" / "llama-nemotron.loss.bin").stat().st_size > 0


def test_index_then_preview(tmp_path: Path) -> None:
    run("fixtures", "map_cc", str(tmp_path))
    assert "no gzip stream that needs an index" in run("index", str(tmp_path / "data.yaml"))
    assert run("index", str(tmp_path / "data.yaml"), "--all").count("places to start from") == 5
    assert run("index", str(tmp_path / "data.yaml"), "--all").count("has its index") == 5
    assert "5 units" in run("preview", str(tmp_path / "data.yaml"), "--source", "map-cc")


def test_errors_are_one_line(tmp_path: Path) -> None:
    for words in (["fixtures", "nemotron", str(tmp_path)], ["sources", "x"], ["preview", str(tmp_path / "no.yaml")]):
        done = subprocess.run(
            [sys.executable, "-c", "from ouro_megatron.cli.main import main; main()", "data", *words],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 3 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
