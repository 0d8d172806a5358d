"""Parameters and floating-point work of a looped model, counted from its shape alone."""

from dataclasses import dataclass

from ouro_megatron.recipe.schema import ModelSection


@dataclass(frozen=True)
class ParameterCounts:
    """Stored parameters: a layer counts once however many loops use it."""

    embedding: int
    layers: int
    """Attention and feed-forward matrices of all layers, norms not included."""
    head: int
    """Output projection, separate from the embedding."""
    norms: int
    """Four norms a layer and the final norm."""
    gate: int
    """Exit gate: one weight a hidden unit and a bias."""

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.head + self.norms + self.gate


def _attention_width(model: ModelSection) -> tuple[int, int]:
    """Widths of all query heads and of all key (or value) heads together."""
    head_dim = model.head_dim if model.head_dim is not None else model.hidden // model.heads
    kv_heads = model.kv_heads if model.kv_heads is not None else model.heads
    return model.heads * head_dim, kv_heads * head_dim


def parameter_counts(model: ModelSection) -> ParameterCounts:
    """Counts of every part of the model: SwiGLU feed-forward, no linear biases, untied embedding and head."""
    query, key = _attention_width(model)
    attention = model.hidden * (2 * query + 2 * key)  # q and output; k and v
    feed_forward = 3 * model.hidden * model.ffn
    return ParameterCounts(
        embedding=model.vocab * model.hidden,
        layers=model.layers * (attention + feed_forward),
        head=model.vocab * model.hidden,
        norms=(4 * model.layers + 1) * model.hidden,
        gate=model.hidden + 1,
    )


def flops_per_token(model: ModelSection, sequence_length: int, *, training: bool = True) -> float:
    """Floating-point operations of one token of a `sequence_length` sequence through all `model.loops` loops.

    A matrix of n weights costs 2 n forward and 4 n backward. Every loop passes through all layers and, to have its
    own prediction, through the output head. Causal attention lets a token see half of the sequence on average:
    scores and weighted sum cost 2 * S * width forward. Norms, the gate and the softmax are left out, and so is the
    second forward of activation recomputation: utilisation measured with this number counts useful work only.
    """
    query, _ = _attention_width(model)
    counts = parameter_counts(model)
    per_loop = 2 * (counts.layers + counts.head) + 2 * model.layers * query * sequence_length
    return float(model.loops * per_loop * (3 if training else 1))


_PEAKS: dict[str, dict[str, float]] = {
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12},
    "H100 NVL": {"bf16": 835e12, "fp8": 1671e12, "fp32": 60e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "H200 NVL": {"bf16": 835e12, "fp8": 1671e12, "fp32": 60e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12},
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None where it is not known (any CPU, other GPUs, a MIG slice).

    `device_name` is what torch.cuda.get_device_name() says, such as "NVIDIA H200"; `dtype` is "bf16", "fp8" or
    "fp32" (without TF32). Vendors print figures with 2:4 sparsity, which are twice these. Sources: NVIDIA's
    datasheets of the A100 (June 2021), the H100 and H200 (SXM, PCIe and NVL columns) and the DGX B200 (72 PFLOPS of
    sparse FP8 over eight GPUs).
    """
    words = device_name.upper().replace("-", " ").split()
    family: str | None = next((name for name in ("A100", "H100", "H200", "B200") if name in words), None)
    if family is None or "MIG" in words:
        return None
    for form in ("PCIe", "NVL"):
        if form.upper() in words and f"{family} {form}" in _PEAKS:
            family = f"{family} {form}"
    return _PEAKS[family].get(dtype)
