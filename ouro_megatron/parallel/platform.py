"""Runs Megatron-Core on a machine without CUDA. The only module that patches the library.

Megatron-Core names CUDA in a few places that have an exact CPU equal: the current device, synchronisation, the
random state, tensors made with device="cuda", and type names such as "torch.cuda.FloatTensor". `activate_cpu`
answers those; on a CUDA platform nothing here is ever called. tests/parallel/test_platform.py fails when an upgrade
of Megatron-Core moves what is patched.
"""

import os
import queue
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from ouro_megatron.errors import TrainingError

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


@dataclass(frozen=True)
class Platform:
    """Where tensors live and which backend connects the ranks."""

    device: torch.device
    backend: Literal["gloo", "nccl"]

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    def memory_in_use(self) -> int | None:
        """The most bytes this process has held on its GPU so far; None on a CPU."""
        return None if self.is_cpu else int(torch.cuda.max_memory_allocated(self.device))

    def megatron_calls(self) -> AbstractContextManager[Any]:
        """Context for calls into Megatron-Core that build or step an optimizer: they ask tensors for CUDA types."""
        return nullcontext() if self.device.type == "cuda" else _CudaNames(self.device)


class _CudaNames(TorchFunctionMode):
    """device="cuda" means the stand-in, Tensor.cuda() is the identity, Tensor.type() answers with the CUDA name."""

    def __init__(self, stand_in: torch.device) -> None:
        super().__init__()
        self._stand_in = stand_in

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = {**kwargs, "device": self._stand_in}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return _CUDA_TYPE_NAMES.get(result, result)
        return result


class _TorchWithoutCuda(ModuleType):
    """Stands in for the name `torch` inside one Megatron module: factories asked for "cuda" use another device.

    Used where a function mode would sit around the whole forward and backward pass and slow every operator.
    """

    def __init__(self, stand_in: torch.device) -> None:
        super().__init__("torch")
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in ("zeros", "tensor", "empty", "ones"):
            return _instead_of_cuda(value, self._stand_in)
        return value


@cache
def _instead_of_cuda(factory: Callable[..., torch.Tensor], stand_in: torch.device) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = stand_in
        return factory(*args, **kwargs)

    return make


def activate_cpu(stand_in: torch.device = _CPU) -> None:
    """Lets Megatron-Core run on CPU tensors in this process. Does nothing the second time.

    With `stand_in` the meta device, tensors have shapes but no contents: for dry runs, in a process of their own.
    Raises TrainingError when CUDA has been initialised: the two do not mix in one process.
    """
    if torch.cuda.is_initialized():
        raise TrainingError("this process has used CUDA already; start a new one with training.device=cpu")
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.pipeline_parallel import schedules

    if isinstance(schedules.torch, _TorchWithoutCuda):
        return

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: stand_in
    cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = get_state
    cuda.set_rng_state = set_state
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    _use_torch_optimizer()
    schedules.torch = _TorchWithoutCuda(stand_in)


def _use_torch_optimizer() -> None:
    """Undoes what Megatron-Core chose on import where apex or Transformer Engine are installed: their kernels take GPU
    tensors only. Without them this is what it chose itself."""
    from megatron.core import optimizer
    from megatron.core import utils as megatron_utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base

    optimizer.Adam = torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    clip_grads.l2_norm_impl = megatron_utils.local_multi_tensor_l2_norm
    for module in (clip_grads, base):
        module.multi_tensor_applier = megatron_utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = megatron_utils.local_multi_tensor_scale


def make_deterministic() -> None:
    """Lets this process use deterministic kernels only: an operation without one raises. Before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory hides reads of it and costs bandwidth; it does not make results more repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_platform(device: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> Platform:
    """The platform a process runs on; binds the process to its GPU or prepares Megatron-Core for the CPU.

    Raises TrainingError when CUDA is asked for and absent, or has fewer devices than local ranks.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise TrainingError("training.device is cuda but this machine has no usable GPU: set training.device=cpu")
        if local_rank >= torch.cuda.device_count():
            raise TrainingError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; "
                "start at most one rank a GPU or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
        return Platform(torch.device("cuda", local_rank), "nccl")
    activate_cpu()
    return Platform(_CPU, "gloo")


def write_checkpoints_without_helpers() -> None:
    """Lets Megatron-Core's synchronous checkpoint writer hand its results over in this process.

    By default it starts a manager process by spawn, which imports the main module again on every rank and dies with the
    first signal that Slurm sends to all processes of a step; later saves would then hang.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
