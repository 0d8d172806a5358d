"""Finds outliers in loss and gradient norm: a robust test against the last steps, the same on every rank.

PaLM (arXiv 2204.02311, section 5.1) met spikes that clipping did not stop and got past them by going back and leaving
out the data in question. This module finds them; training/rollback.py goes back.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.schema import HealthSection

_SIGMA_PER_MAD = 1.4826
"""Standard deviations per median absolute deviation of a normal distribution."""
_LEAST_RELATIVE_SIGMA = 0.01
"""A quiet curve must not make every ripple an outlier: sigma counts as at least this share of the median."""


def deviation(history: Sequence[float], value: float) -> float:
    """How many robust standard deviations `value` lies above the median of `history` (negative: below)."""
    median = statistics.median(history)
    mad = statistics.median(abs(past - median) for past in history)
    sigma = max(_SIGMA_PER_MAD * mad, _LEAST_RELATIVE_SIGMA * abs(median), 1e-12)
    return (value - median) / sigma


class SpikeGuard:
    """Remembers the last `health.window` finite steps. Its `state` goes into checkpoints: a resumed run judges alike.

    Outliers enter the window too: a level that changes for good (another blend, another loop count) is accepted after
    half a window instead of being refused for ever.
    """

    def __init__(self, settings: HealthSection, context: ParallelContext) -> None:
        self._settings = settings
        self._context = context
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._norms: deque[float] = deque(maxlen=settings.window)
        self._loops = 0

    def judge(self, means: LoopMeans, grad_norm: float) -> str | None:
        """Why this step's update should be left out; None when it is like the others. All ranks call it together.

        Rank 0's numbers count for all, so that no rounding can divide the ranks.
        """
        if not self._settings.skip_spikes:
            return None
        loss, norm = self._context.from_rank_zero([means.loss, grad_norm])
        if len(means.ce) != self._loops:  # another number of loops is another loss
            self._losses.clear()
            self._norms.clear()
            self._loops = len(means.ce)
        reason = self._reason(loss, norm)
        self._losses.append(loss)
        self._norms.append(norm)
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if len(self._losses) < self._settings.min_steps:
            return None
        for what, value, history, limit in (
            ("loss", loss, self._losses, self._settings.loss_deviations),
            ("gradient norm", norm, self._norms, self._settings.grad_norm_deviations),
        ):
            away = deviation(history, value)
            if limit is not None and away > limit:
                return (
                    f"{what} {value:.4g} lies {away:.1f} deviations above the median "
                    f"{statistics.median(history):.4g} of {len(history)} steps"
                )
        return None

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON keeps every bit of a float."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms), "loops": self._loops}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave; an empty one (of a run without the policy) begins anew."""
        self._losses = deque(state.get("losses", []), maxlen=self._settings.window)
        self._norms = deque(state.get("grad_norms", []), maxlen=self._settings.window)
        self._loops = int(state.get("loops", 0))
