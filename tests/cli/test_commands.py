"""The command line: help with examples everywhere, quick to start, clear errors; the documents' commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from ouro_megatron.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
OURO = Path(sys.executable).with_name("ouro")


def commands() -> list[str]:
    root = typer.main.get_command(app)
    found = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        children = getattr(command, "commands", None)
        found += [f"{name} {child}" for child in children] if children else [name]
    return found


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(OURO), *words], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_all_commands_are_there() -> None:
    assert set(commands()) >= {
        "train",
        "generate",
        "eval",
        "evaluate",
        "export",
        "import",
        "benchmark",
        "lm_eval",
        "analyse pca",
        "analyse safety",
        "analyse agreement",
        "upcycle",
        "report",
        "data prepare",
        "data verify",
        "data stats",
        "data inspect",
        "data merge",
        "data plan",
        "data status",
        "data tokenizer",
        "data blend",
        "recipe show",
        "recipe check",
        "recipe diff",
    }


@pytest.mark.parametrize("command", commands())
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert "Example" in result.stdout
    assert f"ouro {command}" in result.stdout


def test_help_does_not_import_torch() -> None:
    code = "import sys; import ouro_megatron.cli.main; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_show_check_and_diff() -> None:
    shown = run("recipe", "show", "stages/demo/3-anneal.yaml", "optimizer.lr=1e-4")
    assert yaml.safe_load(shown.stdout)["optimizer"]["lr"] == 1e-4
    origin = run("recipe", "show", "stages/demo/3-anneal.yaml", "--origin")
    assert re.search(r"parallel\.tensor +2 +stages/demo/base\.yaml:\d+", origin.stdout)
    assert run("recipe", "check", "stages/demo/1-stable.yaml", "stages/demo/3-anneal.yaml").returncode == 0
    wrong = run("recipe", "check", "stages/demo/1-stable.yaml", "--nproc", "3")
    assert wrong.returncode == 2 and "3 ranks" in wrong.stderr
    different = run("recipe", "diff", "stages/demo/1-stable.yaml", "stages/demo/3-anneal.yaml").stdout
    assert "model.rope_base\n  - 10000.0\n  + 40000.0" in different


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["evaluate", "/nowhere"], 4, "/nowhere does not exist"),
        (["generate", "/nowhere", "--exit", "often"], 2, "exit policy"),
        (["upcycle", "/nowhere", "--layers", "4", "--out", "x"], 4, "/nowhere"),
        (["report", "/nowhere"], 6, "metrics.jsonl"),
        (["data", "verify", "/nowhere/x"], 3, "/nowhere/x.idx"),
        (["data", "prepare", "/nowhere.yaml"], 3, "/nowhere.yaml"),
    ],
)
def test_errors_are_one_message_with_their_own_code(words: list[str], code: int, message: str) -> None:
    result = run(*words)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_in_the_documents_exist() -> None:
    known = set(commands())
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "Makefile"]:
        pattern = r"(?:^|[\s`/\"])ouro\"? ((?:analyse|checkpoint|data|recipe) )?([a-z][a-z_-]*)"
        for match in re.finditer(pattern, document.read_text()):
            command = f"{match.group(1) or ''}{match.group(2)}"
            if command in {"analyse", "checkpoint", "data", "recipe"} or f"`ouro {command}" not in document.read_text():
                continue
            assert command in known, f"{document.name} names `ouro {command}`"


def test_the_readmes_recipe_is_the_shipped_one() -> None:
    block = re.search(r"```yaml\n# (stages/\S+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    shipped = yaml.safe_load((ROOT / block.group(1)).read_text())
    for key, value in yaml.safe_load(block.group(2)).items():
        assert shipped[key] == value, key
