"""Folders that cannot be imported and exports that must not be kept: one clear error, nothing left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ouro_megatron.checkpoint.huggingface.agreement import compare
from ouro_megatron.checkpoint.huggingface.export import ExportSettings, export
from ouro_megatron.checkpoint.huggingface.importer import import_pretrained
from ouro_megatron.checkpoint.huggingface.shards import ShardWriter
from ouro_megatron.errors import CheckpointError, DataError, OuroError
from tests.checkpoint.huggingface.published import reference, write_published
from tests.distributed.ranks import run_ranks

OURO = Path(sys.executable).with_name("ouro")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def remove_field(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["intermediate_size"]
    path.write_text(json.dumps(config))


NORM = "model.layers.1.input_layernorm_2.weight"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: change(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "extra": (lambda f: change(f, lambda t: t.update(odd=torch.ones(2))), "odd is not part of Ouro's layout"),
    "shape": (
        lambda f: change(f, lambda t: t.update({NORM: torch.ones(5)})),
        rf"{NORM} has shape \(5,\), config.json asks for \(32,\)",
    ),
    "integers": (lambda f: change(f, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)})), "is I32"),
    "vocabulary": (lambda f: configure(f, vocab_size=256), r"asks for \(256, 32\)"),
    "fewer layers": (lambda f: configure(f, num_hidden_layers=2), r"not part of .*and 6 more problems"),
    "model type": (lambda f: configure(f, model_type="llama"), "model_type is 'llama'"),
    "scaled rope": (lambda f: configure(f, rope_scaling={"rope_type": "yarn", "factor": 4}), "RoPE type 'yarn'"),
    "tied": (lambda f: configure(f, tie_word_embeddings=True), "tie_word_embeddings is True"),
    "field": (remove_field, "intermediate_size is missing"),
    "nonsense": (lambda f: configure(f, hidden_size=-3), "hidden"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors files"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors cannot be read",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: "model-00001-of-00002.safetensors"}})
        ),
        "model-00001-of-00002.safetensors is missing",
    ),
    "index without tensors": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: "model.safetensors"}})
        ),
        "disagree on",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_folder_is_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    folder = write_published(tmp_path / "published", dict(reference().state_dict()))
    spoil(folder)
    with pytest.raises((CheckpointError, DataError), match=message):
        import_pretrained(folder, tmp_path / "out" / "imported")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = write_published(tmp_path / "published", dict(reference().state_dict()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(64)])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="ids run up to 160"):
        import_pretrained(folder, tmp_path / "imported")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    """The folder shrinks while it is read: what was written goes away."""
    folder = write_published(tmp_path / "published", dict(reference().state_dict()))

    def spoil(done: int, total: int) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(OuroError, match=r"model\.safetensors"):
        import_pretrained(folder, tmp_path / "imported", spoil)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


def spoiled_export(source: Path, target: Path) -> str:
    """An export in which half of one matrix is written a hundredth too large (all of it would vanish in a norm)."""
    write = ShardWriter.write

    def off(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if name.endswith("1.mlp.up_proj.weight"):
            tensor = tensor.clone()
            tensor[:24] *= 1.01
        write(self, name, tensor)

    ShardWriter.write = off  # type: ignore[method-assign]
    try:
        export(source, target, ExportSettings(dtype="fp32"))
    except CheckpointError as error:
        return str(error)
    finally:
        ShardWriter.write = write  # type: ignore[method-assign]
    return "no error"


def test_an_export_that_is_off_is_not_kept(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "published", dict(reference().state_dict()))
    import_pretrained(folder, tmp_path / "imported")
    message = run_ranks(spoiled_export, 1, tmp_path / "imported", tmp_path / "exported")[0]
    assert "logits differ" in message and message.count("<- off") == 4, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "published"]


def agrees(checkpoint: Path, folder: Path) -> list[bool]:
    return [loop.holds for loop in compare(checkpoint, folder, torch.float32).loops]


def test_small_mistakes_are_seen(tmp_path: Path) -> None:
    """Another RoPE base in config.json puts every loop off."""
    folder = write_published(tmp_path / "published", dict(reference().state_dict()))
    import_pretrained(folder, tmp_path / "imported")
    run_ranks(export_fp32, 1, tmp_path / "imported", tmp_path / "exported")
    exported = tmp_path / "exported"
    assert run_ranks(agrees, 1, tmp_path / "imported", exported)[0] == [True] * 4
    configure(exported, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, rope_theta=10_000.0)
    assert not any(run_ranks(agrees, 1, tmp_path / "imported", exported)[0])


def export_fp32(source: Path, target: Path) -> None:
    export(source, target, ExportSettings(dtype="fp32", check=False))


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(OURO), *map(str, words)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "published", dict(reference().state_dict()))
    imported = run("import", folder, tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    assert "3 layers x 4 loops" in imported.stdout
    again = run("import", folder, tmp_path / "imported")
    assert again.returncode == 4 and "exists already" in again.stderr and "Traceback" not in again.stderr
    exported = run("export", tmp_path / "imported", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    rows = [line.split() for line in exported.stdout.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])]
    assert len(rows) == 4 and all(float(row[1]) < 1e-4 and row[3] == "100.00%" for row in rows)
    wrong = run("export", tmp_path / "imported", tmp_path / "other", "--exit-threshold", 2)
    assert wrong.returncode == 2 and "--exit-threshold" in wrong.stderr
    twice = run("export", tmp_path / "exported", tmp_path / "other")
    assert twice.returncode == 4 and "already" in twice.stderr
    assert not (tmp_path / "other").exists()
