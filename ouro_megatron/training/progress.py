"""Where a run stands, and how that travels through a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ouro_megatron.checkpoint.state import RunState


@dataclass
class Progress:
    """Goes into every checkpoint. The data position follows from the step."""

    step: int = 0
    first_sample: int = 0
    """Where in the blend this stage began."""
    optimizer_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    pending_evaluation: bool = False
    """The evaluation due at this step was interrupted by a stop."""

    def take(self, state: RunState) -> None:
        """Becomes what it was when `state` was saved."""
        self.step = state.step
        self.first_sample = state.first_sample
        self.optimizer_steps = state.optimizer_steps
        self.skipped_steps = state.skipped_steps
        self.skipped_in_a_row = int(state.health.get("skipped_in_a_row", 0))
        self.seconds = state.seconds
        self.pending_evaluation = state.pending_evaluation


def health_values(progress: Progress, window: dict[str, Any], rollbacks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """RunState.health: all that the next decision about a step depends on."""
    return {"skipped_in_a_row": progress.skipped_in_a_row, "window": window, "rollbacks": list(rollbacks)}
