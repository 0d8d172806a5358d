"""What is measured of a trained cell: accuracy on the test sets, bits of biographies known, loss and exits by loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ouro_megatron.errors import DataError
from ouro_megatron.evaluation.likelihood import Continuation
from ouro_megatron.evaluation.scores import Batch, score_tokens
from ouro_megatron.evaluation.session import ModelSession
from ouro_megatron.experiments.corpus import Corpus
from ouro_megatron.experiments.tasks.capo import Capo, known_bits
from ouro_megatron.experiments.tasks.registry import make_task
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.planning.flops import parameter_counts
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import METRICS_NAME, read_records
from ouro_megatron.telemetry.records import EvalRecord

_BATCH = 256
"""Test examples scored at one time."""


def measure(kind: str, recipe: Recipe, corpus: Corpus | None, device: str) -> dict[str, float]:
    """The numbers of one cell by name, from the last checkpoint and the metrics of its run."""
    if kind == "depth":
        return exits_by_loop(recipe.run_folder)
    assert corpus is not None, "settings without a task measure depth"
    session = ModelSession(recipe.run_folder, device=device, batch=_BATCH)
    try:
        return accuracy(session, corpus) if kind == "accuracy" else biography_bits(session, corpus)
    finally:
        session.close()


def accuracy(session: ModelSession, corpus: Corpus) -> dict[str, float]:
    """Percent of each test set that greedy decoding at the last loop would answer exactly, and nats an answer."""
    numbers: dict[str, float] = {}
    for name, pairs in corpus.tests().items():
        requests = [Continuation(prompt, answer) for prompt, answer in pairs]
        longest = max(len(request.context) + len(request.tokens) for request in requests)
        scored = session.score(requests, ExitPolicy(step=session.trained_loops), session.trained_loops, longest)
        numbers[f"accuracy {name}"] = 100 * sum(item.greedy for item in scored) / len(scored)
        numbers[f"loss {name}"] = -sum(item.logprob for item in scored) / len(scored)
    numbers["accuracy"] = sum(v for k, v in numbers.items() if k.startswith("accuracy ")) / len(corpus.tests())
    return numbers


def biography_bits(session: ModelSession, corpus: Corpus) -> dict[str, float]:
    """Bits of the training people that the model knows, in all and a parameter (`known_bits`).

    Each person's biography is read once more, with its attributes in a new order.
    """
    task = make_task(corpus.facts["task"], str(corpus.folder))
    if not isinstance(task, Capo):
        raise DataError(f"{corpus.folder}: bits are measured of biographies (task.kind capo)")
    orders = np.argsort(np.random.default_rng(5).random((task.people, 5)), axis=1)
    examples = task.biographies(orders)
    is_name, is_value = task.value_places(examples)
    loops = session.trained_loops

    def read() -> Iterator[Batch]:
        for start in range(0, len(examples), _BATCH):
            tokens = torch.from_numpy(examples.tokens[start : start + _BATCH].astype(np.int64))
            shape = tokens[:, 1:].shape
            yield {"tokens_bs": tokens[:, :-1], "labels_bs": tokens[:, 1:], "loss_mask_bs": torch.ones(shape)}

    ce_n = score_tokens(session.model.lm, read(), loops).ce_tn[-1].astype(np.float64)
    # Scores run along the sequence first within each batch: put them back to one row a person.
    rows, at, width = [], 0, examples.tokens.shape[1] - 1
    for start in range(0, len(examples), _BATCH):
        people = min(_BATCH, len(examples) - start)
        rows.append(ce_n[at : at + people * width].reshape(width, people).T)
        at += people * width
    ce = np.concatenate(rows)
    name_nats = float((ce * is_name[:, 1:]).sum() / task.people)
    attribute_nats = float((ce * is_value[:, 1:]).sum() / task.people)
    names, attributes = known_bits(task, name_nats, attribute_nats)
    parameters = parameter_counts(session.recipe.model).total
    known_share = attributes / (task.people * task.attribute_bits)
    return {
        "bits": names + attributes,
        "attribute bits": attributes,
        "bits per parameter": (names + attributes) / parameters,
        "attribute bits per parameter": attributes / parameters,
        "attributes known": 100 * known_share,
        "parameters": parameters,
    }


def exits_by_loop(run_folder: Path) -> dict[str, float]:
    """The trainer's last held-out evaluation: loss, exit probability by loop, expected depth."""
    records = [record for record in read_records(run_folder / METRICS_NAME) if isinstance(record, EvalRecord)]
    if not records:
        raise DataError(
            f"{run_folder}: no evaluation in {METRICS_NAME}; data.validation is needed to see exits by loop"
        )
    last = records[-1]
    numbers: dict[str, Any] = {f"loss loop {t}": ce for t, ce in enumerate(last.loops.ce, start=1)}
    numbers |= {f"exits at loop {t}": 100 * p for t, p in enumerate(last.loops.exit_probability, start=1)}
    numbers["loss last loop"] = last.loops.ce[-1]
    numbers["exits at last loop"] = 100 * last.loops.exit_probability[-1]
    numbers["expected loss"] = sum(p * ce for p, ce in zip(last.loops.exit_probability, last.loops.ce, strict=True))
    numbers["expected depth"] = last.loops.expected_depth
    return numbers
