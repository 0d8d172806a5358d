"""Log-likelihoods at every exit against the reference, in batches, cut from the left, on one rank and two."""

from pathlib import Path

import pytest
import torch

from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.evaluation.likelihood import Continuation, score_continuations
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection
from tests.checkpoint.huggingface.published import reference, write_published
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM, exit_probabilities

POLICIES = ["all", "step=1", "step=3", "q=0", "q=0.6", "q=1", "change=0.6", "expected"]
REQUESTS = [
    Continuation([3, 17, 5], [40, 9]),
    Continuation([7], [22, 1, 90, 4, 4]),
    Continuation(list(range(1, 40)), [5]),  # longer than max_length: its context is cut
    Continuation([1, 2], []),
]
MAX_LENGTH = 24
Rows = list[tuple[float, bool, float]]


def ours(path: Path, tensor: int, loops: int) -> dict[str, Rows]:
    context = create_context(ParallelSection(tensor=tensor))
    model = load_for_inference(path, context=context)
    found = {}
    for name in POLICIES:
        scored = score_continuations(
            model.lm, REQUESTS, ExitPolicy.parse(name), loops, batch=3, max_length=MAX_LENGTH, pad=0
        )
        found[name] = [(item.logprob, item.greedy, item.depth) for item in scored]
    context.close()
    return found


def wanted(model: ReferenceLoopLM, name: str, loops: int) -> Rows:
    """By the definition, one sequence and one token at a time."""
    policy, rows = ExitPolicy.parse(name), []
    for request in REQUESTS:
        tokens = [*request.context, *request.tokens][-(MAX_LENGTH + 1) :]
        total, greedy, depths = 0.0, True, []
        with torch.no_grad():
            outputs = model(torch.tensor([tokens]), loops)
        for position in range(len(tokens) - len(request.tokens) - 1, len(tokens) - 1):
            p = [float(x[0, position]) for x in exit_probabilities(outputs)]
            states = [output.hidden_bsh[0, position] for output in outputs]
            depth, cumulative = loops, 0.0
            for loop in range(1, loops + 1):
                cumulative += p[loop - 1]
                change = (states[loop - 1] - states[loop - 2]).norm() / states[loop - 2].norm() if loop > 1 else 9.0
                if policy.leaves(loop, cumulative, float(change), loops):
                    depth = loop
                    break
            logits = outputs[depth - 1].logits_bsv[0, position]
            if policy.expected:
                shares = [share * output.logits_bsv[0, position] for share, output in zip(p, outputs, strict=True)]
                logits = torch.stack(shares).sum(0)
            label = tokens[position + 1]
            total += float(logits.double().log_softmax(-1)[label])
            greedy &= int(logits.argmax()) == label
            depths.append(depth)
        rows.append((total, greedy, sum(depths) / len(depths) if depths else 0.0))
    return rows


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "loops"), [(1, 4), (2, 6)])
def test_scores_are_the_references(tmp_path: Path, tensor: int, loops: int) -> None:
    model = reference()
    folder = write_published(tmp_path / "published", dict(model.state_dict()))
    results = run_ranks(ours, tensor, folder, tensor, loops)
    assert all(result == results[0] for result in results)
    depths = set()
    for name in POLICIES:
        for got, want in zip(results[0][name], wanted(model, name, loops), strict=True):
            assert got[0] == pytest.approx(want[0], abs=1e-4), name
            assert got[1:] == want[1:], name
        depths |= {row[2] for row in results[0][name]}
    assert len(depths) > 4, "the policies all leave at the same loops"
