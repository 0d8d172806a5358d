"""When a token may leave the loop: parsed from what people type, decided from the exit distribution."""

import math
import re
from dataclasses import dataclass

from ouro_megatron.errors import RequestError

_FORM = re.compile(r"^(q|step|change)=(.+)$")
FORMS = "q=0.8 (a number from 0 to 1), step=3 (a loop from 1), change=0.1 (a number above 0), expected or all"


@dataclass(frozen=True)
class ExitPolicy:
    """At most one field is set; with none the last loop is used."""

    q: float | None = None
    """Leave at the first loop where the exit distribution's CDF reaches q (arXiv 2510.25741, Q-exit)."""
    step: int | None = None
    """Always leave at this loop, 1-based."""
    change: float | None = None
    """Leave at the first loop t >= 2 with |h_t - h_{t-1}| < change * |h_{t-1}| (2-norms of the normed states)."""
    expected: bool = False
    """All loops run; the prediction is sum_t p_t logits_t."""

    @classmethod
    def parse(cls, text: str) -> "ExitPolicy":
        """From "q=0.8", "step=3", "change=0.1", "expected" or "all". Raises RequestError for anything else."""
        word = text.strip()
        match = _FORM.match(word)
        try:
            if word == "all":
                return cls()
            if word == "expected":
                return cls(expected=True)
            if match:
                kind, value = match.groups()
                if kind == "q" and 0.0 <= float(value) <= 1.0:
                    return cls(q=float(value))
                if kind == "step" and int(value) >= 1:
                    return cls(step=int(value))
                if kind == "change" and 0.0 < float(value) < math.inf:
                    return cls(change=float(value))
        except ValueError:
            pass
        raise RequestError(f"exit policy {text!r}: write {FORMS}", field="exit")

    def __str__(self) -> str:
        for name in ("q", "step", "change"):
            value = getattr(self, name)
            if value is not None:
                return f"{name}={value:g}"
        return "expected" if self.expected else "all"

    def check(self, max_loops: int) -> None:
        """Raises RequestError when a step lies beyond the loops there are."""
        if self.step is not None and self.step > max_loops:
            raise RequestError(f"exit policy step={self.step} lies beyond {max_loops} loops", field="exit")

    def leaves(self, loop: int, cumulative: float, change: float, max_loops: int) -> bool:
        """Whether a token leaves at `loop` (1-based).

        `cumulative`: the CDF of its exit distribution up to that loop. `change`: the relative change of its state in
        that loop; it has no say in the first.
        """
        if loop >= max_loops:
            return True
        if self.step is not None:
            return loop >= self.step
        if self.change is not None:
            return loop >= 2 and change < self.change
        # At q = 1 only the last loop will do; a rounded CDF may read 1 before it.
        return self.q is not None and self.q < 1.0 and cumulative >= self.q


class ExitTracker:
    """p_t of one token, loop by loop, from its gate logits: p_t = lambda_t S_{t-1}, S_t = S_{t-1} (1 - lambda_t)."""

    def __init__(self, max_loops: int) -> None:
        self._max_loops = max_loops
        self._log_survival = 0.0
        self.probabilities: list[float] = []

    @property
    def cumulative(self) -> float:
        return math.fsum(self.probabilities)

    def add(self, gate_logit: float) -> float:
        """p_t of the next loop; the last one's gate has no say."""
        if len(self.probabilities) + 1 == self._max_loops:
            probability = math.exp(self._log_survival)
        else:
            probability = math.exp(self._log_survival + _log_sigmoid(gate_logit))
            self._log_survival += _log_sigmoid(-gate_logit)
        self.probabilities.append(probability)
        return probability


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
