"""The same corpora prepared from a local folder and from a URL, with the command itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from data_prep.fixtures import Made, make_fixture
from data_prep.prepare import load_data_recipe, prepare
from ouro_megatron.cli.main import app
from tests.data_prep.test_prepare import Lines

KINDS = ("jsonl", "parquet", "arrow", "prolong", "map_cc", "text_folder")
_COMMAND = [sys.executable, "-c", "from ouro_megatron.cli.main import main; main()", "data", "prepare"]


@dataclass(frozen=True)
class Corpora:
    """Small corpora of several kinds below a folder, and what comes of them when they are read from there."""

    folder: Path
    made: Mapping[str, Made]
    tokenizer: Path
    expected: Mapping[str, bytes]

    def sources(self, url: str, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
        """Settings of the sources with the files below `url` in place of the folder; the tokenizers stay local."""

        def moved(name: str, value: Any) -> Any:
            is_file = isinstance(value, str) and name != "tokenizer"
            return value.replace(str(self.folder), url) if is_file else value

        return [
            {"name": kind, **{name: moved(name, value) for name, value in self.made[kind].settings.items()}}
            for kind in kinds
        ]

    def recipe(self, output: Path, sources: list[dict[str, Any]], **more: Any) -> Path:
        """A recipe beside its output, with the tokenizer of the local preparation."""
        return _write_recipe(output, sources, {"kind": "existing", "path": str(self.tokenizer)}, **more)


def make_corpora(root: Path) -> Corpora:
    """Makes and prepares them locally, in shards of another size than `Corpora.recipe` asks for."""
    folder = root / "corpora"
    made = {kind: make_fixture(kind, folder / kind) for kind in KINDS}
    output = root / "local"
    tokenizer = {"kind": "train", "vocab": 500}
    sources = [{"name": kind, **each.settings} for kind, each in made.items()]
    recipe = _write_recipe(output, sources, tokenizer, shard_bytes=1_000_000)
    prepare(load_data_recipe(recipe), Lines(), workers=1)
    return Corpora(folder, made, output / "tokenizer", outputs(output))


def _write_recipe(output: Path, sources: list[dict[str, Any]], tokenizer: dict[str, Any], **more: Any) -> Path:
    values = {"output": str(output), "tokenizer": tokenizer, "validation_fraction": 0.25, "shard_bytes": 2000}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**values, "sources": sources, **more}))
    return file


def outputs(folder: Path) -> dict[str, bytes]:
    """Each .bin and .idx by its name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


def run_here(recipe: Path) -> Result:
    """`ouro data prepare` in this process, with one worker."""
    return CliRunner().invoke(app, ["data", "prepare", str(recipe), "--workers", "1"])


def run_command(recipe: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`ouro data prepare` in a process of its own."""
    command = [*_COMMAND, str(recipe), "--workers", "1"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def kill_command(recipe: Path, environment: Mapping[str, str], shards: int) -> dict[Path, int]:
    """The command with two workers, killed as soon as some shards are there; the time of each finished one's mark."""
    process = subprocess.Popen([*_COMMAND, str(recipe), "--workers", "2"], env={**os.environ, **environment})
    parts = recipe.with_suffix("") / ".parts"
    marks = "*/" + "[0-9a-f]" * 32 + "/done.json"  # not those in the making, which have .part- in their names
    deadline = time.monotonic() + 120
    while len(list(parts.glob(marks))) < shards:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return {mark: mark.stat().st_mtime_ns for mark in parts.glob(marks)}
