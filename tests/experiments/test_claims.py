"""Verdicts: margins, noise between seeds, what was not run."""

from typing import Any

import pytest

from ouro_megatron.errors import RecipeError
from ouro_megatron.experiments.cells import cells_of
from ouro_megatron.experiments.claims import judge, standard_error
from ouro_megatron.experiments.settings import NAMES, SCALES, Claim, ExperimentFile, load_settings, parse_shape, shown


def settings(*claims: dict[str, Any], **over: Any) -> ExperimentFile:
    values = {
        "title": "t",
        "task": {"kind": "mano"},
        "shapes": ["2x1", "2x6", "12x1"],
        "claims": list(claims),
        "recipe": {},
        **over,
    }
    return ExperimentFile.model_validate(values)


def results(**groups: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {f"{n[1:]}": [{"metrics": {"accuracy": value}} for value in values] for n, values in groups.items()}


def claim(kind: str, first: str, second: str, **over: Any) -> Claim:
    return Claim.model_validate({"kind": kind, "first": first, "second": second, "metric": "accuracy", **over})


@pytest.mark.parametrize(
    ("kind", "margin", "first", "second", "verdict"),
    [
        ("above", 5, [98.0, 98.2, 98.1], [21.5, 22.0, 21.0], "holds"),
        ("above", 5, [25.0, 25.1, 24.9], [21.5, 21.6, 21.4], "does not hold"),
        ("above", 0, [60.0, 20.0, 40.0], [30.0, 35.0, 25.0], "not clear"),
        ("below", 0, [1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "holds"),
        ("below", 0, [2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "does not hold"),
        ("not_above", 1, [10.0, 10.2, 9.8], [10.1, 10.0, 9.9], "holds"),
        ("not_above", 1, [13.0, 13.2, 12.8], [10.1, 10.0, 9.9], "does not hold"),
        ("not_below", 2, [97.0, 97.1, 96.9], [98.0, 98.1, 97.9], "holds"),
        ("not_below", 2, [90.0, 90.1, 89.9], [98.0, 98.1, 97.9], "does not hold"),
        ("above", 5, [98.0], [21.5], "not clear"),
        ("above", 5, [], [21.5], "not run"),
    ],
)
def test_verdicts(kind: str, margin: float, first: list[float], second: list[float], verdict: str) -> None:
    file = settings()
    judged = judge(claim(kind, "2x6", "2x1", margin=margin), file, results(g2x6=first, g2x1=second))
    assert judged.verdict == verdict
    assert judged.first == first and f": {verdict}" in judged.sentence


def test_sentences_say_what_is_equal_and_by_how_much() -> None:
    measured = results(g2x6=[98.0, 98.2], g2x1=[21.0, 22.0], g12x1=[93.0, 93.2])
    judged = judge(claim("above", "2x6", "2x1"), settings(), measured)
    assert judged.sentence.startswith("accuracy: 2⊗6 is above 2⊗1 at equal parameters: holds; 98.1 against 21.5")
    assert "differs by 76.6 ± " in judged.sentence
    assert "at equal FLOPs" in judge(claim("not_below", "2x6", "12x1"), settings(), measured).sentence


def test_a_relative_margin_is_a_share_of_the_second() -> None:
    measured = results(g2x6=[1.05, 1.051], g2x1=[1.0, 1.001])
    assert judge(claim("not_above", "2x6", "2x1", margin=0.1, relative=True), settings(), measured).verdict == "holds"
    closer = claim("not_above", "2x6", "2x1", margin=0.01, relative=True)
    assert judge(closer, settings(), measured).verdict == "does not hold"


def test_standard_error_is_welchs() -> None:
    assert standard_error([1.0, 3.0], [2.0, 2.0]) == pytest.approx((2.0 / 2) ** 0.5)
    assert standard_error([1.0], [2.0, 4.0]) == 0.0


def test_shapes_are_read_in_both_spellings() -> None:
    assert parse_shape("2x6") == parse_shape("2⊗6") == (2, 6) and shown("12x1") == "12⊗1"
    for wrong in ("2*6", "0x3", "2x", "six"):
        with pytest.raises(ValueError, match="write layers x loops"):
            parse_shape(wrong)


def test_claims_must_name_groups_that_exist() -> None:
    with pytest.raises(ValueError, match="claim about '3x1'"):
        settings({"kind": "above", "first": "3x1", "second": "2x1", "metric": "accuracy"})
    variants = [{"name": "a", "label": "A"}, {"name": "b", "label": "B", "shapes": ["2x1"]}]
    assert settings(variants=variants).groups == ["2x1/a", "2x6/a", "12x1/a", "2x1/b"]


def test_cells_are_chosen_by_shape_group_or_variant() -> None:
    file = settings(variants=[{"name": "a", "label": "A"}, {"name": "b", "label": "B"}], seeds=2)
    assert len(cells_of(file)) == 12 and len(cells_of(file, seeds=3)) == 18
    assert {cell.group for cell in cells_of(file, only=["2⊗6", "12x1/b"])} == {"2x6/a", "2x6/b", "12x1/b"}
    assert {cell.group for cell in cells_of(file, only=["b"])} == {"2x1/b", "2x6/b", "12x1/b"}
    names = [cell.name for cell in cells_of(file)]
    assert names[0] == "2x1-a-seed1" and len(set(names)) == 12
    with pytest.raises(RecipeError, match="--cells 4x1"):
        cells_of(file, only=["4x1"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_shipped_settings_have_cells_and_claims(name: str, scale: str) -> None:
    file = load_settings(name, scale)
    assert file.claims and len(cells_of(file)) >= 3
    assert {shape.partition("/")[0] for shape in file.groups} == set(file.shapes)


def test_unknown_experiments_scales_and_keys_are_refused() -> None:
    with pytest.raises(RecipeError, match="known here: addition"):
        load_settings("sorting", "tiny")
    with pytest.raises(RecipeError, match="one of tiny, small, paper"):
        load_settings("mano", "huge")
    with pytest.raises(RecipeError, match="did you mean 'examples'"):
        load_settings("mano", "small", ["example=3"])
