"""Settings files of experiments: what to train, with what, and what is claimed. One file an experiment and scale."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.load import load_section
from ouro_megatron.recipe.schema import PositiveInt, Section

NAMES = ("addition", "phop", "mano", "multihop", "capo", "prior")
SCALES = ("tiny", "small", "paper")
_SHAPE = re.compile(r"^(\d+)[x⊗](\d+)$")


class Variant(Section):
    """Another axis beside the shape: more people, another prior, fewer samples."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._]*$")]
    label: str
    """As tables and pictures say it."""
    shapes: list[str] | None = None
    """Of the file's shapes, those that this variant is trained in; all when absent."""
    task: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    examples: PositiveInt | None = None
    value: float | None = None
    """Where it lies on the x axis of its picture."""


class Claim(Section):
    """A sentence of the talk as a comparison of two groups of cells. A group is "SHAPE" or "SHAPE/VARIANT"."""

    kind: Literal["above", "below", "not_above", "not_below"]
    """`above`: first > second by more than `margin`. `not_below`: first >= second - margin; the other two alike."""
    first: str
    second: str
    metric: str
    margin: float = 0.0
    relative: bool = False
    """`margin` is a share of the second's mean."""
    because: str = ""
    """What the comparison holds equal, or what it says."""


class ExperimentFile(Section):
    """One experiment at one scale."""

    title: str
    note: str = ""
    """What is particular about this scale, for the page."""
    task: dict[str, Any] | None = None
    """What the data is made of; without it the recipe names a corpus of its own."""
    examples: PositiveInt = 1
    """Training examples that are drawn and stored; the budget decides how often they are read."""
    test_examples: PositiveInt = 1000
    """Of each test set, all different where there are so many."""
    shapes: list[str]
    """k x L, such as "2x6": 2 layers used 6 times."""
    variants: list[Variant] = Field(default_factory=list)
    seeds: PositiveInt = 3
    measure: Literal["accuracy", "bits", "depth"] = "accuracy"
    """`accuracy`: greedy exact match on the test sets. `bits`: what the model knows of the biographies. `depth`:
    held-out loss and exits by loop."""
    claims: list[Claim]
    recipe: dict[str, Any]
    """What all cells share; the rest of a recipe is filled in: name, layers, loops, vocabulary, data, seed."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Learning rate of a shape that needs another one than the recipe's."""
    beside: dict[str, str] = Field(default_factory=dict)
    """For each shape, the one of the talk that plays its part."""
    hours: str = "4:00:00"
    """Time limit of one cell's Slurm task."""

    @model_validator(mode="after")
    def _names_exist(self) -> "ExperimentFile":
        for shape in [*self.shapes, *self.rates, *self.beside]:
            parse_shape(shape)
        if self.task is None and self.measure != "depth":
            raise ValueError(f"measure {self.measure} asks about a task: set task, or measure depth")
        groups = set(self.groups)
        for claim in self.claims:
            missing = [group for group in (claim.first, claim.second) if group not in groups]
            if missing:
                raise ValueError(f"claim about {missing[0]!r}, the groups are {', '.join(sorted(groups))}")
        return self

    @property
    def groups(self) -> list[str]:
        """SHAPE, or SHAPE/VARIANT where there are variants, in order."""
        if not self.variants:
            return list(self.shapes)
        return [
            f"{shape}/{v.name}" for v in self.variants for shape in self.shapes if shape in (v.shapes or self.shapes)
        ]

    def variant(self, name: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == name), None)


def parse_shape(text: str) -> tuple[int, int]:
    """(k, L) from "2x6" or "2⊗6". Raises ValueError."""
    match = _SHAPE.match(text.strip())
    if match is None or "0" in match.groups():
        raise ValueError(f"{text!r}: write layers x loops, such as 2x6")
    return int(match.group(1)), int(match.group(2))


def shown(shape: str) -> str:
    """ "2⊗6" for "2x6"."""
    layers, loops = parse_shape(shape)
    return f"{layers}⊗{loops}"


def load_settings(name: str, scale: str, overrides: list[str] | None = None) -> ExperimentFile:
    """The settings shipped with the package, or of the file that `scale` names, with `key.path=value` on top.

    Raises RecipeError for an unknown experiment or scale and for what is wrong in the file.
    """
    if name not in NAMES:
        raise RecipeError(f"experiment {name!r}: known here: {', '.join(NAMES)}")
    if scale in SCALES:
        path = Path(str(files("ouro_megatron.experiments"))) / "settings" / name / f"{scale}.yaml"
    elif scale.endswith((".yaml", ".yml")):
        path = Path(scale)
    else:
        raise RecipeError(f"--scale {scale}: one of {', '.join(SCALES)}, or a settings file (.yaml)")
    return load_section(path, ExperimentFile, overrides or [])
