"""When a token may leave the loop: parsed from what people type, decided from the exit distribution."""

import re
from dataclasses import dataclass

from ouro_megatron.errors import RecipeError

_FORM = re.compile(r"^(q|step)=(.+)$")


@dataclass(frozen=True)
class ExitPolicy:
    """Exactly one of `q` and `step` is set, or neither: then the last loop is used."""

    q: float | None = None
    """Leave at the first loop where the exit distribution's CDF reaches q (arXiv 2510.25741, Q-exit)."""
    step: int | None = None
    """Always leave at this loop, 1-based."""

    @classmethod
    def parse(cls, text: str) -> "ExitPolicy":
        """From "q=0.8", "step=3" or "all". Raises RecipeError for anything else."""
        match = _FORM.match(text.strip())
        try:
            if text.strip() == "all":
                return cls()
            if match and match.group(1) == "q" and 0.0 <= float(match.group(2)) <= 1.0:
                return cls(q=float(match.group(2)))
            if match and match.group(1) == "step" and int(match.group(2)) >= 1:
                return cls(step=int(match.group(2)))
        except ValueError:
            pass
        raise RecipeError(f"--exit {text!r}: write q=0.8 (a number from 0 to 1), step=3 (a loop from 1) or all")

    def __str__(self) -> str:
        if self.q is not None:
            return f"q={self.q:g}"
        return "all" if self.step is None else f"step={self.step}"

    def leaves(self, loop: int, cumulative: float, max_loops: int) -> bool:
        """Whether a token leaves at `loop` (1-based), given the CDF of its exit distribution up to that loop."""
        if loop >= max_loops:
            return True
        if self.step is not None:
            return loop >= self.step
        # At q = 1 only the last loop will do; a rounded CDF may read 1 before it.
        return self.q is not None and self.q < 1.0 and cumulative >= self.q
