"""The loss head over T loops against what a user would write or install instead: peak memory and time, same run.

    python -m benchmarks.loss_head                      # CPU, two threads, Ouro's vocabulary
    python -m benchmarks.loss_head --device cuda --dtype bf16 --tokens 8192 --hidden 2048

One problem: states of T loops, one head, sum_t sum_n c_tn CE_tn with its gradients by the states and by the weight,
added to an fp32 buffer as Megatron keeps it. The coefficients c (exit probabilities) are known, as in training.

    ours        one-pass chunked head of this project
    logits      materialised logits and torch's cross_entropy, autograd
    torch       torch.nn.functional.linear_cross_entropy (torch 2.13), in chunks of the same size as ours
    torch-auto  the same with chunks of torch's choice; only when asked for (--only): on a CPU, with few tokens and a
                large vocabulary, that is one token at a time
    liger       Liger kernel's fused linear cross-entropy (CUDA, when installed)
    cce         Apple's cut cross-entropy (CUDA, when installed)

A token's own coefficient needs losses token by token: `torch` and `cce` then form the logits again in backward, and
`liger` cannot at all. `--plain` sets all coefficients to one, so that each can use its quickest way (one sum).
Every measurement is a process of its own; medians and ratios are printed. On a CPU the peak is the growth of the
process's resident memory, on CUDA that of torch's allocator.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

SYSTEMS = ("ours", "logits", "torch", "torch-auto", "liger", "cce")


@dataclass(frozen=True)
class Problem:
    """States [n, h] of each loop, the head [v, h] with its fp32 `main_grad`, labels [n], coefficients [T, n]."""

    states: list[Tensor]
    weight: Tensor
    labels: Tensor
    coefficients: Tensor
    chunk: int
    plain: bool


def make(arguments: argparse.Namespace) -> Problem:
    torch.manual_seed(0)
    device, dtype = arguments.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    shape = (arguments.tokens, arguments.hidden)
    states = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(arguments.loops)]
    weight = (torch.randn(arguments.vocab, arguments.hidden, device=device) * 0.02).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=device)  # type: ignore[attr-defined]
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,), device=device)
    coefficients = torch.rand(arguments.loops, arguments.tokens, device=device)
    if arguments.plain:
        coefficients = torch.ones_like(coefficients)
    return Problem(states, weight, labels, coefficients, arguments.chunk, arguments.plain)


def _ours(problem: Problem) -> Tensor:
    import torch.distributed as dist

    from ouro_megatron.objective.head import HeadGroup, WeightedCrossEntropy

    head = HeadGroup(dist.group.WORLD, 0, 1, False)  # type: ignore[arg-type]
    terms = [
        WeightedCrossEntropy.apply(state[:, None], problem.weight, problem.labels, weights, head, problem.chunk)[0]
        for state, weights in zip(problem.states, problem.coefficients, strict=True)
    ]
    total = torch.stack(terms).sum()
    total.backward()
    return total.detach()


def _with(losses: Callable[[Problem, Tensor], Tensor]) -> Callable[[Problem], Tensor]:
    """A step of a system that gives each state's losses: [n], or with --plain their sum."""

    def step(problem: Problem) -> Tensor:
        parts = [losses(problem, state) for state in problem.states]
        weighted = parts if problem.plain else [c * part for c, part in zip(problem.coefficients, parts, strict=True)]
        total = torch.stack([part.float().sum() for part in weighted]).sum()
        total.backward()
        problem.weight.main_grad.add_(problem.weight.grad)  # type: ignore[attr-defined]
        problem.weight.grad = None
        return total.detach()

    return step


def _logits(problem: Problem, state: Tensor) -> Tensor:
    logits = (state @ problem.weight.t()).float()
    return F.cross_entropy(logits, problem.labels, reduction="sum" if problem.plain else "none")


def _torch(problem: Problem, state: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=problem.chunk, chunking_method=None)
    return _torch_with(options, problem, state)


def _torch_auto(problem: Problem, state: Tensor) -> Tensor:
    return _torch_with(torch.nn.LinearCrossEntropyOptions(), problem, state)


def _torch_with(options: Any, problem: Problem, state: Tensor) -> Tensor:
    reduction = "sum" if problem.plain else "none"
    return F.linear_cross_entropy(state, problem.weight, problem.labels, reduction=reduction, options=options)


def _liger(problem: Problem, state: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(problem.weight, state, problem.labels)


def _cce(problem: Problem, state: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(state, problem.weight, problem.labels, reduction="sum" if problem.plain else "none")


STEPS: dict[str, Callable[[Problem], Tensor]] = {
    "ours": _ours,
    "logits": _with(_logits),
    "torch": _with(_torch),
    "torch-auto": _with(_torch_auto),
    "liger": _with(_liger),
    "cce": _with(_cce),
}


def measure(system: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs in the child: median seconds, peak bytes above what the problem itself holds, and numbers to compare."""
    torch.set_num_threads(arguments.threads)
    problem, step = make(arguments), STEPS[system]
    cuda = arguments.device == "cuda"
    seconds, value = [], torch.tensor(0.0)
    before = _held(cuda)
    for _ in range(arguments.steps):
        for tensor in problem.states:
            tensor.grad = None
        problem.weight.main_grad.zero_()  # type: ignore[attr-defined]
        started = _now(cuda)
        value = step(problem)
        seconds.append(_now(cuda) - started)
    grads = [problem.states[0].grad, problem.weight.main_grad]  # type: ignore[attr-defined]
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": _peak(cuda) - before,
        "loss": float(value),
        "norms": [float(grad.double().norm()) for grad in grads if grad is not None],
    }


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _held(cuda: bool) -> float:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    with Path("/proc/self/statm").open() as file:
        return float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def _peak(cuda: bool) -> float:
    if cuda:
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def runnable(arguments: argparse.Namespace) -> list[str]:
    """The systems that this device and these packages can run; says why others are left out."""
    wanted = [name for name in SYSTEMS if (name in arguments.only if arguments.only else name != "torch-auto")]
    if not hasattr(F, "linear_cross_entropy"):
        wanted = [name for name in wanted if not name.startswith("torch")]
        print("left out: torch (linear_cross_entropy needs torch 2.13)")
    for name, package in (("liger", "liger_kernel"), ("cce", "cut_cross_entropy")):
        why = "needs CUDA" if arguments.device == "cpu" else ""
        if not why and importlib.util.find_spec(package) is None:
            why = f"{package} is not installed"
        if not why and name == "liger" and not arguments.plain:
            why = "cannot weight tokens"
        if why and name in wanted:
            wanted.remove(name)
            print(f"left out: {name} ({why})")
    return wanted


def _child(system: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loss_head", *sys.argv[1:], "--child", system]
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if run.returncode:
        sys.exit(f"{system} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=1024, help="objective.chunk_tokens")
    parser.add_argument("--plain", action="store_true", help="all coefficients one")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each system")
    parser.add_argument("--steps", type=int, default=3, help="steps in each; the first is left out of the times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS)
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments)))
        return
    systems = runnable(arguments)
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for _ in range(arguments.rounds):
        for system in systems:
            found[system].append(_child(system))
    show(found, arguments)


def show(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    def median(system: str, key: str) -> float:
        return statistics.median(result[key] for result in found[system])

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    weights = "coefficients one" if arguments.plain else "a coefficient a token"
    table = Table(
        title=f"{name}, {arguments.dtype}: T={arguments.loops}, {arguments.tokens} tokens, hidden {arguments.hidden}, "
        f"vocabulary {arguments.vocab}, {weights}"
    )
    for column in ("head", "seconds", "x ours", "peak MiB", "x ours", "loss", "|dh_1|", "|dW|"):
        table.add_column(column, justify="left" if column == "head" else "right")
    first = next(iter(found))
    for system, results in found.items():
        seconds, peak = median(system, "seconds"), median(system, "bytes")
        table.add_row(
            system,
            f"{seconds:.3f}",
            f"{seconds / median(first, 'seconds'):.2f}",
            f"{peak / 2**20:.0f}",
            f"{peak / median(first, 'bytes'):.2f}",
            f"{results[-1]['loss']:.1f}",
            *(f"{norm:.4g}" for norm in results[-1]["norms"]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
