"""Where a rank is in its work, for the message when something stalls or dies."""

from dataclasses import dataclass


@dataclass
class Position:
    """Written by the training loop as it goes; read when an error is reported."""

    stage: str = ""
    step: int = 0
    phase: str = "start"
    loop: int = 0
    microbatch: int = 0

    def __str__(self) -> str:
        where = f"stage {self.stage}, step {self.step}, {self.phase}"
        if self.phase in ("forward and backward", "evaluation"):
            where += f", last forward: loop {self.loop}, microbatch {self.microbatch}"
        return where
