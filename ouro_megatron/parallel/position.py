"""Where a rank is in its work, for the message when something stalls or dies."""

from dataclasses import dataclass
from typing import Literal

STEP_PHASES = ("reading data", "forward and backward", "reducing gradients", "optimizer step", "evaluation")
"""Phases that follow each other quickly: who stays in one has stalled, even when nobody waits for it yet."""

_WITH_MICROBATCHES = ("forward and backward", "evaluation")

Task = Literal["", "forward", "backward", "after forward", "after backward"]


@dataclass
class Position:
    """Written by the training loop as it goes; read by the watchdog's thread and when an error is reported."""

    stage: str = ""
    step: int = 0
    phase: str = "start"
    task: Task = ""
    """The schedule's task that runs, or that ran last."""
    loop: int = 0
    """From 1; 0 in a backward that runs through all loops at once."""
    microbatch: int = 0
    """From 1, of this data-parallel rank's in the step."""

    def enter(self, phase: str) -> None:
        """Begins a phase of a step, before its first task."""
        self.task, self.loop, self.microbatch = "", 0, 0
        self.phase = phase

    def __str__(self) -> str:
        where = f"stage {self.stage}, step {self.step}, {self.phase}"
        if self.task and self.phase in _WITH_MICROBATCHES:
            loop = f"loop {self.loop}" if self.loop else "all loops"
            where += f", {self.task} of {loop}, microbatch {self.microbatch}"
        return where
