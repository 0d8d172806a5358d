"""Fine-tuning on conversations: from chat messages to a trained checkpoint, packed, on one and on two ranks."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.chat import ChatEncoder
from data_prep.writer import PairWriter
from ouro_megatron.data.dataset import build_dataset
from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord, StepRecord
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.stage import run_stage
from tests.data_prep.test_chat import write_chat_tokenizer
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.distributed


ANSWER = "<think>\n" + 16 * "0" + "\n</think>\n\n" + 16 * "0"


def talk(number: int) -> list[dict[str, Any]]:
    """Random questions that nobody could predict, always the same answer."""
    generator = random.Random(number)
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}] if number % 3 == 0 else []
    for _ in range(generator.randrange(1, 4)):
        question = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randrange(3, 12)))
        turns.append({"role": "user", "content": question + "<|im_end|>"})
        turns.append({"role": "assistant", "content": ANSWER})
    return turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sft") / "with space"
    encoder = ChatEncoder(write_chat_tokenizer(root / "tokenizer"))
    for name, numbers in (("train", range(60)), ("held-out", range(1000, 1030))):
        counts: list[bool] = []
        with PairWriter(root / name, np.dtype("<u2")) as writer:
            for number in numbers:
                ids, marks = encoder.encode(talk(number))
                writer.add(ids)
                counts += marks
        (root / f"{name}.loss.bin").write_bytes(bytes(counts))
    return root


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    data = {
        "sequence_length": 128,
        "tokenizer": str(folder / "tokenizer"),
        "train": [{"path": str(folder / "train"), "weight": 1}],
        "validation": [{"path": str(folder / "held-out"), "weight": 1}],
        "packing": "best_fit",
        "long_documents": "truncate",
    }
    model = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 512, "loops": 2}
    values = {
        "data": data,
        "model": model,
        "batch": {"global_tokens": 512},
        "budget": {"total": "30 steps"},
        "optimizer": {"lr": 2e-2},
    }
    return tiny_recipe(folder, **{**values, **sections})


def stage(recipe: Recipe) -> bool:
    return run_stage(recipe, StopSignals())


def losses(recipe: Recipe) -> tuple[list[float], float]:
    records = read_records(recipe.run_folder / "metrics.jsonl")
    steps = [record.loss for record in records if isinstance(record, StepRecord)]
    return steps, [record.loss for record in records if isinstance(record, EvalRecord)][-1]


def train(folder: Path, ranks: int, name: str, parallel: dict[str, Any], **sections: Any) -> tuple[list[float], float]:
    recipe = recipe_of(folder, name=name, parallel={"timeout_seconds": 120, **parallel}, **sections)
    run_ranks(stage, ranks, recipe)
    return losses(recipe)


def test_what_counts_is_what_the_assistant_says(folder: Path) -> None:
    """Read as two data-parallel ranks read it: one epoch's counted labels are the answers, each once."""
    recipe = recipe_of(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    dataset = build_dataset(recipe.data, samples=2, seed=1, tokenizer=tokenizer, cache=None, split_name="train")
    samples = dataset.packing[0].sequences // 2 * 2
    dataset = build_dataset(recipe.data, samples=samples, seed=1, tokenizer=tokenizer, cache=None, split_name="train")
    answer = tokenizer.encode(ANSWER + "<|im_end|>", special=True)
    counted = 0
    for rank in range(2):
        reader = MicrobatchReader(dataset, GlobalBatchSampler(1, rank, 2), torch.device("cpu"))
        for batch in reader.step(0, samples):
            marked = batch["labels_bs"][batch["loss_mask_bs"] > 0].tolist()
            counted += len(marked)
            text = tokenizer.decode(marked)
            whole = tokenizer.decode(answer)
            # A newline before an answer may be one token with it; a truncated talk ends inside an answer.
            pieces = [piece.strip() for piece in text.split("<|im_end|>")]
            assert all(whole.startswith(piece) for piece in pieces), text
            assert batch["positions_bs"].device.type == "cpu"
        reader.close()
    assert counted > 20 * len(answer)


@pytest.mark.slow
def test_it_learns_the_answers_on_two_ranks_and_goes_on_where_it_stopped(folder: Path) -> None:
    curve, held_out = train(folder, 2, "straight", {"data": 2})
    # Answers hold no surprise, questions do: a loss near 0 can only be of the answers.
    assert curve[0] > 4.0
    assert curve[-1] < 1.5
    assert held_out < 1.5
    train(folder, 2, "halves", {"data": 2}, budget={"total": "15 steps"})
    assert train(folder, 2, "halves", {"data": 2}) == (curve, held_out)
    one, alone = train(folder, 2, "other", {"tensor": 2, "sequence": True}, training={"recompute": "full"})
    assert one == pytest.approx(curve, abs=2e-4)
    assert alone == pytest.approx(held_out, abs=2e-4)
