"""lm-evaluation-harness on local tasks at several exits: through our runner and through the harness's own command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import RecipeError
from ouro_megatron.evaluation.benchmark import BenchmarkSettings, TaskChoice, read_suite, run_benchmark
from tests.checkpoint.huggingface.published import reference, write_published
from tests.distributed.ranks import run_ranks
from tests.evaluation.local_tasks import QUESTIONS, write_tasks
from tests.reference.looplm import ReferenceLoopLM, reference_generate

PAPER = {
    "mmlu": 5,
    "mmlu_pro": 5,
    "bbh_cot_fewshot": 3,
    "arc_challenge": 25,
    "hellaswag": 10,
    "winogrande": 5,
    "gsm8k_cot": 3,
    "minerva_math500": 4,
    "humaneval": 0,
    "humaneval_plus": 0,
    "mbpp": 3,
    "mbpp_plus": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("harness") / "published", dict(reference().state_dict()))


def run(path: Path, tasks: Path, exits: list[str], out: Path | None, names: list[str]) -> list[dict[str, Any]]:
    settings = BenchmarkSettings([TaskChoice(name) for name in names], exits, include=[tasks], batch=3, max_length=64)
    return [vars(result) for result in run_benchmark(path, settings, out=out)]


def reference_choice(model: ReferenceLoopLM, folder: Path, loop: int) -> float:
    encode, right = load_tokenizer(folder).encode, 0
    for row in QUESTIONS:
        context = encode(row["question"])
        values = []
        for choice in row["choices"]:
            tokens = encode(f"{row['question']} {choice}")
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[loop - 1].logits_bsv[0].log_softmax(-1)
            values.append(sum(float(logits[i - 1, tokens[i]]) for i in range(len(context), len(tokens))))
        right += values.index(max(values)) == row["answer"]
    return right / len(QUESTIONS)


def reference_bits(model: ReferenceLoopLM, folder: Path, loop: int) -> float:
    encode, nats, size = load_tokenizer(folder).encode, 0.0, 0
    for row in QUESTIONS:
        tokens = [0, *encode(row["question"])]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[loop - 1].logits_bsv[0].log_softmax(-1)
        nats -= sum(float(logits[i - 1, tokens[i]]) for i in range(1, len(tokens)))
        size += len(row["question"].encode())
    return nats / math.log(2) / size


def reference_free(model: ReferenceLoopLM, folder: Path, loop: int) -> list[str]:
    tokenizer = load_tokenizer(folder)
    texts = []
    for row in QUESTIONS:
        made, _ = reference_generate(model, tokenizer.encode(row["question"]), 6, loop)
        made = made[: made.index(0)] if 0 in made else made
        texts.append(tokenizer.decode(made).split(".")[0])
    return texts


@pytest.mark.slow
def test_tasks_at_several_exits(folder: Path, tmp_path: Path) -> None:
    model = reference()
    tasks = write_tasks(tmp_path / "tasks")
    names = ["local_choice", "local_rolling", "local_free"]
    results = run_ranks(run, 1, folder, tasks, ["all", "step=2", "q=0.6"], tmp_path / "out", names, timeout=240)[0]
    by_key = {(result["task"], result["exit"]): result for result in results}
    assert len(by_key) == 9
    for name, loop in (("all", 4), ("step=2", 2)):
        assert by_key["local_choice", name]["value"] == pytest.approx(reference_choice(model, folder, loop))
        assert by_key["local_rolling", name]["value"] == pytest.approx(reference_bits(model, folder, loop), rel=1e-5)
        wanted = reference_free(model, folder, loop)
        golds = [row["choices"][row["answer"]] for row in QUESTIONS]
        matches = sum(text == gold for text, gold in zip(wanted, golds, strict=True)) / len(golds)
        assert by_key["local_free", name]["value"] == pytest.approx(matches)
        assert by_key["local_choice", name]["mean_loops"] == loop
    between = by_key["local_rolling", "q=0.6"]
    assert 1 < between["mean_loops"] < 4 and between["samples"] == len(QUESTIONS)
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert len(saved["results"]) == 9 and (tmp_path / "out" / "benchmark.png").stat().st_size > 1000


def free_texts(path: Path, loop: int) -> list[str]:
    from lm_eval.api.instance import Instance

    from ouro_megatron.evaluation.harness import OuroMegatronLM

    lm = OuroMegatronLM(str(path), exit=f"step={loop}", max_length=64, batch_size="2")
    requests = [
        Instance("generate_until", {}, (row["question"], {"until": ["."], "max_gen_toks": 6}), index)
        for index, row in enumerate(QUESTIONS)
    ]
    texts = lm.generate_until(requests, disable_tqdm=True)
    lm.session.close()
    return texts


@pytest.mark.parametrize("loop", [1, 4])
def test_answers_are_the_references(folder: Path, loop: int) -> None:
    assert run_ranks(free_texts, 1, folder, loop)[0] == reference_free(reference(), folder, loop)


@pytest.mark.distributed
def test_two_tensor_parallel_ranks_agree_with_one(folder: Path) -> None:
    first, second = run_ranks(free_texts, 2, folder, 3)
    assert first == second == reference_free(reference(), folder, 3)


@pytest.mark.slow
def test_the_harness_own_command(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    words = [sys.executable, "-c", "from ouro_megatron.cli import main; main()", "lm_eval", "--model", "ouro_megatron"]
    words += ["--model_args", f"pretrained={folder},exit=step=2,max_length=64", "--tasks", "local_choice"]
    words += ["--include_path", str(tasks), "--output_path", str(tmp_path / "results.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = tmp_path.glob("results*.json")
    value = json.loads(file.read_text())["results"]["local_choice"]["acc,none"]
    assert value == pytest.approx(reference_choice(reference(), folder, 2))


def test_the_ready_list_names_tasks_that_the_harness_has() -> None:
    from lm_eval.tasks import TaskManager

    choices = read_suite("ouro-base")
    assert {choice.task: choice.shots for choice in choices} == PAPER
    assert set(PAPER) <= set(TaskManager().all_tasks)
    assert {choice.task for choice in choices if choice.unsafe} == {"humaneval", "humaneval_plus", "mbpp", "mbpp_plus"}


def test_what_cannot_be_run(folder: Path, tmp_path: Path) -> None:
    for settings, message in (
        (BenchmarkSettings([]), "name tasks"),
        (BenchmarkSettings([TaskChoice("no_such_task")]), "knows no task no_such_task"),
        (BenchmarkSettings(read_suite("ouro-base")), "--allow-code"),
        (BenchmarkSettings([TaskChoice("mmlu")], exits=["q=2"]), "exit policy 'q=2'"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            run_benchmark(folder, settings)
        assert getattr(caught.value, "exit_code", 1) != 1
    with pytest.raises(RecipeError, match="neither a file nor one of ouro-base"):
        read_suite("nothing")
    (tmp_path / "mine.yaml").write_text("tasks: [{task: x, shot: 3}]")
    with pytest.raises(RecipeError, match="a list `tasks`"):
        read_suite(str(tmp_path / "mine.yaml"))
