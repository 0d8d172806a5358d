"""The quantisers against the plain reference, and what must hold whatever the values."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_megatron.model.fp8.scaling import (
    E4M3,
    E5M2,
    Quantiser,
    Recipe,
    e8m0_scale,
    power_of_two_scale,
    round_trip,
    tensor_scale,
)
from tests.reference.fp8 import TABLE, Fp8Reference, blockwise_scale, mx_scale, nearest

FORMS = {"e4m3": E4M3, "e5m2": E5M2}
RECIPES = get_args(Recipe)
ONE = torch.tensor(1.0)
# Half a unit in the last place of the largest binade's neighbour: 3 mantissa bits and 2.
HALF_STEP = {"e4m3": 2.0**-4, "e5m2": 2.0**-3}


def values(seed: int, m: int = 128, k: int = 256) -> Tensor:
    """Normal, with columns of very different sizes and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 3, k)
    x[torch.rand(m, k, generator=generator) < 0.1] = 0.0
    return x


@pytest.mark.parametrize("form", FORMS)
def test_every_8_bit_float_comes_back(form: str) -> None:
    table = TABLE[form].float()
    assert torch.equal(round_trip(table, ONE, FORMS[form]), table)
    # One code for each sign of zero, and those of infinities and NaN.
    assert len(table) == {"e4m3": 253, "e5m2": 247}[form]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_rounding_is_to_the_nearest_ties_to_even(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for form, dtype in FORMS.items():
        assert torch.equal(round_trip(x, ONE, dtype).double(), nearest(x.double(), form))


@given(st.floats(min_value=0.0, max_value=2.0**127, width=32))
@settings(max_examples=300, deadline=None)
def test_scales(amax: float) -> None:
    """The largest value lands on or below the format's largest, within a factor of two of it for powers of two."""
    whole = torch.tensor(amax)
    for form, dtype in FORMS.items():
        largest = torch.finfo(dtype).max
        exact, power, stored = (f(whole, dtype) for f in (tensor_scale, power_of_two_scale, e8m0_scale))
        for scale in (exact, power, stored):
            assert math.isfinite(scale) and scale > 0
        if form == "e4m3" and amax > 1e-30:
            assert power.double() == blockwise_scale(whole.double())
        if amax > 1e-30:
            assert exact * whole == pytest.approx(largest, rel=1e-6)
            assert largest / 2 * (1 - 1e-6) <= power * whole <= largest
            assert largest / 2 * (1 - 1e-6) <= stored * whole <= largest * (1 + 1e-6)
        for scale in (power, stored):
            assert math.frexp(scale)[0] == 0.5
        assert 2.0**-127 <= stored <= 2.0**127
    if amax > 1e-30:
        assert e8m0_scale(whole, E4M3).double() == mx_scale(whole.double())


@pytest.mark.parametrize(
    ("recipe", "form"),
    [(recipe, form) for recipe in RECIPES for form in FORMS if form == "e4m3" or recipe in ("current", "delayed")],
)
@pytest.mark.parametrize("contracted", [0, 1])
def test_against_the_reference(recipe: Recipe, form: str, contracted: int) -> None:
    x = values(1)
    scale = torch.tensor(3.7) if recipe == "delayed" else None
    mine = Quantiser(recipe).rounded(x.double(), FORMS[form], contracted=contracted, scale=scale)
    plain = Fp8Reference(recipe).operand(x.double(), form, contracted, None if scale is None else float(scale))
    assert mine.dtype == torch.float64
    torch.testing.assert_close(mine, plain, rtol=1e-7, atol=0.0)
    assert Quantiser(recipe).rounded(x.bfloat16(), E4M3, contracted=contracted, scale=scale).dtype == torch.float32


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_for_both_products(recipe: Recipe) -> None:
    weight = values(2)
    scale = torch.tensor(0.5) if recipe == "delayed" else None
    forward, backward = Quantiser(recipe).rounded_weight(weight, scale)
    assert (forward is backward) is (recipe != "mxfp8")
    plain = Fp8Reference(recipe).weight(0, 0, weight.double(), None if scale is None else 0.5)
    for mine, wanted in zip((forward, backward), plain, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-60, 60))
@settings(max_examples=15, deadline=None)
def test_what_holds_for_all_values(recipe: Recipe, form: str, seed: int, exponent: int) -> None:
    x = values(seed, 128, 128) * 2.0**exponent
    quantiser = Quantiser(recipe)
    out = quantiser.rounded(x, FORMS[form], contracted=1)
    assert torch.isfinite(out).all()
    assert torch.equal(out[x == 0], x[x == 0])
    assert ((out == 0) | (out.sign() == x.sign())).all()
    # Relative to each value, and near zero to the smallest step at the block's scale.
    block = {"current": x.abs().max()}.get(recipe, x.abs().amax())
    smallest = float(TABLE[form][TABLE[form] > 0].min()) * 2 * float(block) / torch.finfo(FORMS[form]).max
    assert ((out - x).abs() <= HALF_STEP[form] * x.abs() * (1 + 1e-5) + smallest).all()
    assert torch.equal(quantiser.rounded(-x, FORMS[form], contracted=1), -out)
    if recipe != "current":
        # A power of two moves through block scales untouched, and rounding twice changes nothing.
        assert torch.equal(quantiser.rounded(4 * x, FORMS[form], contracted=1), 4 * out)
        assert torch.equal(quantiser.rounded(out, FORMS[form], contracted=1), out)


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_a_block_does_not_suffer_from_another(recipe: Recipe) -> None:
    """One huge value takes the precision of its own block: of all, for one scale a tensor."""
    x = torch.full((128, 256), 1e-3)
    x[0, 0] = 1e4
    out = Quantiser(recipe).rounded(x, E4M3, contracted=1)
    lost = int((out[0] == 0).sum())
    assert lost == {"current": 255, "blockwise": 127, "mxfp8": 31}[recipe]
    assert bool((out[1] == 0).all()) is (recipe == "current")


def test_beyond_the_largest_saturates() -> None:
    x = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan, 449.0])
    out = round_trip(x, ONE, E4M3)
    assert out[:4].tolist() == [448.0, -448.0, 448.0, -448.0] and out[4].isnan() and out[5] == 448.0
    assert round_trip(x, ONE, E5M2)[:2].tolist() == [57344.0, -57344.0]


@pytest.mark.parametrize("recipe", ["current", "blockwise", "mxfp8"])
def test_values_that_are_no_numbers(recipe: Recipe) -> None:
    """NaN stays visible, and spoils no more than its block; an infinity saturates, as it does in the kernels."""
    x = torch.ones(128, 256)
    x[3, 5], x[7, 200] = torch.nan, torch.inf
    out = Quantiser(recipe).rounded(x, E4M3, contracted=1)
    assert out[3, 5].isnan() and out[7, 200] > 0
    assert torch.isfinite(out[0]).all() and (out[0] == 1.0).all()
    if recipe != "current":
        assert torch.isfinite(out[3, 128:]).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40])
def test_zeros_and_denormals(recipe: Recipe, size: float) -> None:
    x = torch.full((128, 128), size)
    scale = torch.tensor(1.0) if recipe == "delayed" else None
    out = Quantiser(recipe).rounded(x, E4M3, contracted=1, scale=scale)
    assert torch.isfinite(out).all() and (out >= 0).all() and (out <= 2 * size + 1e-44).all()


@pytest.mark.parametrize(("recipe", "unit"), [("current", 16), ("delayed", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_edges_that_do_not_fit_are_refused(recipe: Recipe, unit: int) -> None:
    quantiser = Quantiser(recipe)
    scale = torch.tensor(1.0)
    for shape in ((unit + unit // 2, unit), (unit, unit + unit // 2)):
        with pytest.raises(ValueError, match=f"multiples of {unit}"):
            quantiser.rounded(torch.ones(shape), E4M3, contracted=1, scale=scale)
        with pytest.raises(ValueError, match=f"multiples of {unit}"):
            quantiser.rounded_weight(torch.ones(shape), scale)
    assert quantiser.rounded(torch.ones(unit, 3 * unit), E4M3, contracted=1, scale=scale).shape == (unit, 3 * unit)
