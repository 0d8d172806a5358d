"""Training steps of Ouro's sizes on one GPU: this project's, and the same model in plain PyTorch, compiled."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plain_model import PlainLoopLM
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.planning.flops import flops_per_token, peak_flops
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.schema import Fp8Section, ModelSection, ObjectiveSection, OptimizerSection, Recompute
from ouro_megatron.training.engine import Engine, Microbatch

STAGES = Path(__file__).resolve().parents[2] / "stages"
System = Literal["plain", "plain_fp32", "local", "transformer_engine"]
"""plain_fp32: plain PyTorch that keeps fp32 weights and moments and adds microbatches in fp32, as training does."""
PLAIN = ("plain", "plain_fp32")


@dataclass(frozen=True)
class Case:
    name: str
    model: Literal["ouro-1.4b", "ouro-2.6b"]
    system: System
    sequence: int = 4096
    microbatch: int = 2
    microbatches: int = 4
    fp8: Literal["current", "blockwise", "delayed"] | None = None
    recompute: Recompute = "none"
    recompute_loops: int | None = None
    cuda_graphs: bool = False

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.sequence * self.microbatch * self.microbatches


_TE: System = "transformer_engine"
CASES = [
    Case("1.4b plain, compiled", "ouro-1.4b", "plain"),
    Case("1.4b plain, compiled, fp32 weights", "ouro-1.4b", "plain_fp32"),
    Case("1.4b local bf16", "ouro-1.4b", "local"),
    Case("1.4b TE bf16", "ouro-1.4b", _TE),
    Case("1.4b TE FP8 current", "ouro-1.4b", _TE, fp8="current"),
    # More rows: FP8 is fast enough for Python to hold it up with two.
    Case("1.4b 3 rows TE bf16", "ouro-1.4b", _TE, microbatch=3, microbatches=3),
    Case("1.4b 3 rows TE FP8 current", "ouro-1.4b", _TE, microbatch=3, microbatches=3, fp8="current"),
    Case("1.4b 3 rows TE FP8 blockwise", "ouro-1.4b", _TE, microbatch=3, microbatches=3, fp8="blockwise"),
    Case("1.4b 4 rows TE FP8 current", "ouro-1.4b", _TE, microbatch=4, microbatches=2, fp8="current"),
    Case("1.4b 3 rows plain, compiled", "ouro-1.4b", "plain", microbatch=3, microbatches=3),
    Case("1.4b 3 rows graphs, TE bf16", "ouro-1.4b", _TE, microbatch=3, microbatches=3, cuda_graphs=True),
    Case("1.4b 3 rows plain, compiled, fp32 weights", "ouro-1.4b", "plain_fp32", microbatch=3, microbatches=3),
    Case("2.6b plain, compiled", "ouro-2.6b", "plain", microbatch=1),
    Case("2.6b plain, compiled, fp32 weights", "ouro-2.6b", "plain_fp32", microbatch=1),
    Case("2.6b TE bf16", "ouro-2.6b", _TE, microbatch=1, recompute="selective"),
    Case("2.6b TE FP8 current", "ouro-2.6b", _TE, microbatch=1, fp8="current"),
    Case("1.4b graphs, TE bf16", "ouro-1.4b", _TE, cuda_graphs=True),
    Case("1.4b graphs, TE FP8 current", "ouro-1.4b", _TE, fp8="current", cuda_graphs=True),
    Case("2.6b graphs, TE bf16", "ouro-2.6b", _TE, microbatch=1, recompute="selective", cuda_graphs=True),
    Case("2.6b graphs, TE FP8 current", "ouro-2.6b", _TE, microbatch=1, fp8="current", cuda_graphs=True),
    Case("1.4b 16K TE bf16", "ouro-1.4b", _TE, 16_384, 1, 2, recompute="full", recompute_loops=2),
    Case("1.4b 16K TE FP8 current", "ouro-1.4b", _TE, 16_384, 1, 2, "current", "full", 2),
]


def model_section(case: Case) -> ModelSection:
    implementation = "local" if case.system in PLAIN else case.system
    loaded = load_recipe(STAGES / case.model / "4-stable-2.yaml")
    return loaded.model.model_copy(update={"implementation": implementation})


def measure(case: Case, context: ParallelContext, steps: int, warm_up: int, profile: Path | None) -> dict[str, object]:
    """Median tokens/s over `steps` whole optimizer steps, MFU, and the most bytes allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = model_section(case)
    shape = (case.microbatches, case.microbatch, case.sequence)
    tokens, labels = torch.randint(0, model.vocab, (2, *shape), device="cuda").unbind()
    started = time.perf_counter()
    step = (_plain if case.system in PLAIN else _ours)(case, model, context, tokens, labels)
    losses = [step() for _ in range(warm_up)]
    torch.cuda.synchronize()
    ready = time.perf_counter() - started
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    if profile is not None:
        _profile(step, profile / f"{case.name.replace(' ', '-').replace(',', '')}.txt")
    rate = case.tokens / statistics.median(times)
    # FP8 is counted against bf16's peak too: the same yardstick for both.
    peak = peak_flops(torch.cuda.get_device_name(), "bf16")
    return {
        "case": case.name,
        "tokens_per_s": rate,
        "mfu_bf16": None if peak is None else rate * flops_per_token(model, case.sequence) / peak,
        "peak_gib": peak_bytes(case) / 2**30,
        "step_seconds": times,
        "seconds_until_ready": ready,
        "losses": losses,
    }


def peak_bytes(case: Case) -> int:
    """The most that was allocated; with graphs, whose room counts as free between recordings, the most held of CUDA."""
    return torch.cuda.max_memory_reserved() if case.cuda_graphs else torch.cuda.max_memory_allocated()


def _ours(
    case: Case, model: ModelSection, context: ParallelContext, tokens: Tensor, labels: Tensor
) -> Callable[[], float]:
    fp8 = None if case.fp8 is None else Fp8Section(recipe=case.fp8)
    lm = LoopLM(
        model,
        context,
        dtype=torch.bfloat16,
        recompute=case.recompute,
        recompute_loops=case.recompute_loops,
        fp8=fp8,
    )
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    engine = Engine(
        lm,
        context,
        ObjectiveSection(chunk_tokens=4096),
        OptimizerSection(lr=3e-4),
        loops=model.loops,
        cuda_graphs=case.cuda_graphs,
    )
    engine.adopt_weights()
    ones = torch.ones(tokens.shape[1:], device="cuda")
    batches = [Microbatch(x, y, ones) for x, y in zip(tokens, labels, strict=True)]
    return lambda: engine.train_step(batches, 3e-4).means.loss


def _plain(
    case: Case, model: ModelSection, context: ParallelContext, tokens: Tensor, labels: Tensor
) -> Callable[[], float]:
    """Weights, gradients and fused AdamW in bf16, which is less exact and faster, or in fp32. cuDNN attention."""
    with torch.device("cuda"):
        plain = PlainLoopLM(model).bfloat16()
    for layer in plain.layers:
        layer.compile(dynamic=False)
    plain.cross_entropy = torch.compile(plain.cross_entropy, dynamic=False)  # type: ignore[method-assign]
    used = list(plain.parameters())
    trained = used if case.system == "plain" else [weight.detach().float().requires_grad_() for weight in used]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=trained is used)
        total = torch.zeros((), device="cuda")
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            for x, y in zip(tokens, labels, strict=True):
                loss = plain(x, y, 0.1) / len(tokens)
                loss.backward()
                total += loss.detach()
                if trained is not used:
                    _add_gradients(trained, used)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if trained is not used:
            torch._foreach_copy_([weight.data for weight in used], [weight.data for weight in trained])
        return float(total)

    return step


def _add_gradients(trained: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    """A microbatch's bf16 gradients to the fp32 ones."""
    for main, weight in zip(trained, used, strict=True):
        assert weight.grad is not None
        main.grad = weight.grad.float() if main.grad is None else main.grad.add_(weight.grad)
        weight.grad = None


def _profile(step: Callable[[], float], path: Path) -> None:
    """Kernels of one step by the time they take on the GPU, and how long the GPU was busy in all."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    table = found.key_averages().table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90)
    path.write_text(f"wall {wall:.3f} s (with the profiler), kernels {busy / 1e6:.3f} s\n{table}\n", encoding="utf-8")
