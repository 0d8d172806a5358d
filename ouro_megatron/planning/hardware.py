"""What a GPU and its links can do: datasheet figures, and the fractions of them that a training run reaches."""

from dataclasses import dataclass
from typing import Literal

from ouro_megatron.errors import RecipeError
from ouro_megatron.planning.flops import peak_flops

GB = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device and the machine it sits in. Sources: NVIDIA's datasheets (SXM forms); bandwidths are one direction."""

    name: str
    memory_bytes: float
    """What a process can allocate, a little less than the datasheet says."""
    memory_bandwidth: float
    """Bytes a second between the GPU and its own memory."""
    node_bandwidth: float
    """Bytes a second to a GPU of the same node (NVLink)."""
    network_bandwidth: float
    """Bytes a second to a GPU of another node: one network adapter a GPU."""
    gpus_per_node: int = 8

    def peak(self, dtype: Literal["bf16", "fp8", "fp32"]) -> float:
        """Dense FLOP/s. Raises RecipeError where the device has no such arithmetic."""
        found = peak_flops(self.name, dtype)
        if found is None:
            raise RecipeError(f"{self.name} has no {dtype} arithmetic; choose another precision or another --gpu")
        return found


GPUS = {
    "a100": Gpu("A100", 79.1 * GIB, 2039 * GB, 300 * GB, 25 * GB),
    "h100": Gpu("H100", 79.1 * GIB, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Gpu("H200", 139.8 * GIB, 4800 * GB, 450 * GB, 50 * GB),
    "b200": Gpu("B200", 178.0 * GIB, 8000 * GB, 900 * GB, 50 * GB),
}


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the datasheet that are reached, and what the host costs.

    All but `node`, `network` and `latency_seconds`, which are assumptions, are read off Ouro-1.4B's training step on
    one H200 (docs/results/gpu.md): matrix products of Transformer Engine, cuDNN's attention, this project's kernels.
    """

    matmul: float = 0.71
    attention: float = 0.515
    """For long sequences, forward and backward together; of one of S tokens S / (S + attention_ramp) of that."""
    attention_ramp: float = 1764.0
    memory: float = 0.75
    fp8_gain: float = 1.45
    """How much faster matrix products are in FP8, rounding included; twice is the datasheet's word."""
    node: float = 0.75
    network: float = 0.80
    host_layer_seconds: float = 1.5e-3
    """Python and launches for the forward of one layer, and half of what backward takes: small pieces of work wait."""
    host_fp8: float = 1.27
    """How much more the host does in FP8."""
    latency_seconds: float = 1.5e-5
    """Of one collective or one message."""


def gpu_named(name: str) -> Gpu:
    """Raises RecipeError naming those that are known."""
    if name.lower() not in GPUS:
        raise RecipeError(f"no figures for GPU {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name.lower()]
