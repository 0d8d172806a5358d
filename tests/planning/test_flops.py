"""Counts against numbers worked out by hand for the published shapes."""

import pytest

from ouro_megatron.planning.flops import flops_per_token, parameter_counts, peak_flops
from ouro_megatron.recipe.schema import ModelSection


def _ouro(layers: int, loops: int = 4) -> ModelSection:
    return ModelSection(layers=layers, hidden=2048, heads=16, ffn=5632, vocab=49_152, loops=loops)


def test_a_layer_of_the_published_shape_has_51_4_million_weights() -> None:
    counts = parameter_counts(_ouro(1))
    assert counts.layers == 4 * 2048**2 + 3 * 2048 * 5632 == 51_380_224


@pytest.mark.parametrize(("layers", "total"), [(24, 1.434e9), (48, 2.668e9)])
def test_totals_of_the_published_sizes(layers: int, total: float) -> None:
    counts = parameter_counts(_ouro(layers))
    assert counts.embedding == counts.head == 100_663_296
    assert counts.norms == (4 * layers + 1) * 2048
    assert counts.gate == 2049
    assert counts.total == pytest.approx(total, rel=1e-3)


def test_loops_cost_work_but_no_parameters() -> None:
    assert parameter_counts(_ouro(24, loops=8)) == parameter_counts(_ouro(24, loops=1))
    assert flops_per_token(_ouro(24, loops=8), 4096) == 8 * flops_per_token(_ouro(24, loops=1), 4096)


def test_training_work_of_the_1_4b_at_four_loops_and_4096_tokens() -> None:
    work = flops_per_token(_ouro(24), 4096)
    assert work == pytest.approx(36.8e9, rel=2e-3)
    matrices = 6 * 4 * (24 * 51_380_224 + 49_152 * 2048)
    attention = 6 * 4 * 24 * 2048 * 4096
    assert work == matrices + attention


def test_inference_is_a_third_of_training() -> None:
    assert 3 * flops_per_token(_ouro(24), 4096, training=False) == flops_per_token(_ouro(24), 4096)


def test_grouped_keys_and_explicit_head_width_are_counted() -> None:
    model = ModelSection(layers=1, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=100, vocab=10, loops=1)
    # q and o: 64 x 128 each; k and v: 64 x 64 each; three 64 x 100 matrices
    assert parameter_counts(model).layers == 2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 100
    more_tokens = flops_per_token(model, 20, training=False) - flops_per_token(model, 10, training=False)
    assert more_tokens == 2 * 128 * 10


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_is_the_dense_one_of_the_form_factor_or_unknown(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == peak
