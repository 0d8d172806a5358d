"""Published weights in and out: bit for bit, at any layout, and saying what the reference says."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ouro_megatron.checkpoint.folder import problem_with
from ouro_megatron.checkpoint.huggingface.agreement import loop_logits
from ouro_megatron.checkpoint.huggingface.export import Dtype, ExportSettings, export
from ouro_megatron.checkpoint.huggingface.importer import import_pretrained
from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.checkpoint.state import history_with, read_state
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection
from tests.checkpoint.huggingface.published import CONFIG, reference, write_published
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM
from tests.reference.mapping import reference_config
from tests.training.test_resume import train

DEEP = replace(CONFIG, layers=4)  # a pipeline of two needs an even number
TOKENS = [[3, 17, 5, 40, 9, 61, 2, 90], [1, 2, 3, 4, 5, 6, 7, 8]]


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def wanted_logits(model: ReferenceLoopLM) -> np.ndarray:
    with torch.no_grad():
        return torch.stack([output.logits_bsv for output in model(torch.tensor(TOKENS))]).numpy()


def our_logits(path: Path, tensor: int, loops: int) -> np.ndarray:
    context = create_context(ParallelSection(tensor=tensor))
    model = load_for_inference(path, context=context)
    logits = torch.stack(loop_logits(model.lm, torch.tensor(TOKENS), loops)).numpy()
    context.close()
    return logits


def export_and_count(source: Path, target: Path, dtype: Dtype, shard_bytes: int) -> list[tuple[float, float, bool]]:
    exported = export(source, target, ExportSettings(dtype=dtype, shard_bytes=shard_bytes))
    assert exported.agreement is not None
    return [(loop.largest, loop.argmax, loop.holds) for loop in exported.agreement.loops]


@pytest.mark.parametrize(("dtype", "shards"), [("bf16", 3), ("fp32", 1)])
def test_there_and_back_is_bit_exact(tmp_path: Path, dtype: Dtype, shards: int) -> None:
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    tensors = {name: tensor.to(kind) for name, tensor in reference().state_dict().items()}
    source = write_published(tmp_path / "Ouro 1", tensors, shards=shards)
    imported, back = tmp_path / "runs" / "imported", tmp_path / "back"
    import_pretrained(source, imported)
    assert problem_with(imported) is None
    agreement = run_ranks(export_and_count, 1, imported, back, dtype, 20_000)[0]
    assert len(agreement) == CONFIG.loops
    assert all(largest < 1e-4 and argmax > 0.98 and holds for largest, argmax, holds in agreement)
    assert len(list(back.glob("*.safetensors"))) > 1
    found = read_all(back)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == kind and torch.equal(found[name], tensor), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
    assert {key: after[key] for key in before if key != "torch_dtype"} == {
        key: value for key, value in before.items() if key != "torch_dtype"
    }
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ids = json.loads((back / "generation_config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"], ids["bos_token_id"]) == (0, 0, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_imported_weights_say_what_the_reference_says(tmp_path: Path, tensor: int) -> None:
    model = reference()
    source = write_published(tmp_path / "published", dict(model.state_dict()), shards=2)
    import_pretrained(source, tmp_path / "imported")
    wanted = wanted_logits(model)
    for path in (tmp_path / "imported", source):  # through a checkpoint, and straight from the published folder
        for logits in run_ranks(our_logits, tensor, path, tensor, CONFIG.loops):
            assert np.abs(logits - wanted).max() < 2e-5


@pytest.mark.distributed
def test_a_stage_starts_from_an_import_and_exports_from_its_layout(tmp_path: Path) -> None:
    """Import -> training at TP 2 x PP 2 -> export: the exported weights are the trained ones."""
    model = reference(DEEP)
    source = write_published(tmp_path / "published", dict(model.state_dict()), DEEP)
    import_pretrained(source, tmp_path / "imported")
    state = read_state(tmp_path / "imported")
    assert [(record.name, record.kind) for record in history_with(state)] == [("published", "import")]
    section = {"layers": DEEP.layers, "heads": 4, "kv_heads": 2, "head_dim": 16, "loops": 4, "rope_base": 20_000.0}
    recipe = train(
        tmp_path / "stage",
        "tp2pp2",
        name="stage",
        model={**section, "hidden": 32, "ffn": 48, "vocab": CONFIG.vocab},
        init={"checkpoint": str(tmp_path / "imported")},
        budget={"total": "5 steps"},
    )
    out = tmp_path / "exported"
    agreement = run_ranks(export_and_count, 1, recipe.run_folder, out, "fp32", 10**9)[0]
    assert all(holds for _, _, holds in agreement)
    trained = ReferenceLoopLM(reference_config(recipe.model))
    trained.load_state_dict(read_all(out))
    logits = run_ranks(our_logits, 1, recipe.run_folder, 1, CONFIG.loops)[0]
    assert np.abs(logits - wanted_logits(trained)).max() < 2e-5
    assert np.abs(logits - wanted_logits(model)).max() > 1e-3, "training changed nothing"
