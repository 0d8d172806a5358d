"""Whether the talk's claims hold in what was measured: a verdict and a sentence for each."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ouro_megatron.experiments.settings import Claim, ExperimentFile, parse_shape, shown

Verdict = Literal["holds", "does not hold", "not clear", "not run"]
Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Group -> results of its cells, one a seed."""


@dataclass(frozen=True)
class Judged:
    """One claim beside the numbers."""

    verdict: Verdict
    sentence: str
    first: list[float]
    """One value a seed."""
    second: list[float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(claim: Claim, settings: ExperimentFile, results: Results) -> Judged:
    """Compares the means over seeds. The difference must pass the margin; one that does by less than two standard
    errors of the difference is `not clear`, and so are one that misses it by less and one of a single seed."""
    first, second = (_values(results.get(group, ()), claim.metric) for group in (claim.first, claim.second))
    names = [_label(group, settings) for group in (claim.first, claim.second)]
    words = {
        "above": "is above",
        "below": "is below",
        "not_above": "is not above",
        "not_below": "is not below",
    }[claim.kind]
    because = claim.because or _holds_equal(claim.first, claim.second)
    claimed = f"{claim.metric}: {names[0]} {words} {names[1]}" + (f" {because}" if because else "")
    if not first or not second:
        return Judged("not run", f"{claimed}: not run", first, second)
    difference = statistics.fmean(first) - statistics.fmean(second)
    margin = claim.margin * abs(statistics.fmean(second)) if claim.relative else claim.margin
    surplus = {
        "above": difference - margin,
        "below": -difference - margin,
        "not_above": margin - difference,
        "not_below": margin + difference,
    }[claim.kind]
    error = standard_error(first, second)
    verdict: Verdict = "holds" if surplus > 0 else "does not hold"
    alone = min(len(first), len(second)) < 2
    if alone or abs(surplus) < 2 * error:
        verdict = "not clear"
    by = f"by {_number(difference)} " + ("(one seed)" if alone else f"± {_number(2 * error)}")
    limit = f" (margin {_number(margin)})" if margin else ""
    values = f"{_number(statistics.fmean(first))} against {_number(statistics.fmean(second))}, differs {by}{limit}"
    return Judged(verdict, f"{claimed}: {verdict}; {values}", first, second)


def standard_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the difference of two means (Welch); 0 where there are fewer than two values of each."""
    if len(first) < 2 or len(second) < 2:
        return 0.0
    return math.sqrt(statistics.variance(first) / len(first) + statistics.variance(second) / len(second))


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _values(cells: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [float(cell["metrics"][metric]) for cell in cells if metric in cell["metrics"]]


def _label(group: str, settings: ExperimentFile) -> str:
    shape, _, name = group.partition("/")
    variant = settings.variant(name)
    return shown(shape) if variant is None else f"{shown(shape)} ({variant.label})"


def _holds_equal(first: str, second: str) -> str:
    """What two shapes have in common."""
    (k, loops), (k2, loops2) = (parse_shape(group.partition("/")[0]) for group in (first, second))
    if (k, loops) == (k2, loops2):
        return ""
    if k == k2:
        return "at equal parameters"
    return "at equal FLOPs" if k * loops == k2 * loops2 else ""


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
