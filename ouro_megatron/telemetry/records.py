"""What a run writes down: one JSON object a line in metrics.jsonl, read back by the report."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoopStats:
    """Means over the counted tokens. Lists have one entry a loop, loop 1 first."""

    ce: list[float]
    """Cross-entropy in nats a token of each loop's own prediction."""
    exit_probability: list[float]
    entropy: float
    """Entropy of the exit distribution in nats."""
    expected_depth: float
    """sum_t t p_t, between 1 and T."""


@dataclass(frozen=True)
class RankSpread:
    """Seconds that ranks spent in one step reading data and in forward and backward tasks, waiting left out.

    Tensor-parallel ranks wait for each other inside a task: they all show the slowest one's time.
    """

    fastest_seconds: float
    slowest_seconds: float
    slowest_rank: int
    straggler_rank: int
    """Whose time is the largest multiple of the fastest rank's at the same pipeline position."""
    straggler_ratio: float
    """That multiple; 1 where no two ranks share a position."""
    straggler_excess: float
    """The same as a difference in seconds."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps done in this stage, this one included."""
    total_steps: int
    tokens: int
    """Tokens consumed in this stage, this step included."""
    total_tokens: int
    loss: float
    """The objective that was minimised, per token."""
    loops: LoopStats
    grad_norm: float
    lr: float
    global_tokens: int
    """Tokens of this step's global batch."""
    seconds: float
    tokens_per_second: float
    mfu: float | None
    """Model FLOPs utilisation in 0..1; None where the device's peak is not known (CPU)."""
    skipped: bool
    """The update was left out: not finite, or an outlier (health.skip_spikes)."""
    skipped_steps: int
    """Skipped updates in this stage so far."""
    skip_reason: str = ""
    rollbacks: int = 0
    """Returns to an earlier checkpoint in this stage so far."""
    source_share: dict[str, float] = field(default_factory=dict)
    """Share of the tokens of this stage so far by source of the blend; adds up to 1."""
    ranks: RankSpread | None = None
    """None for a single rank."""
    system: dict[str, float] = field(default_factory=dict)
    """Rank 0's machine; see telemetry/system.py."""


@dataclass(frozen=True)
class EvalRecord:
    """One pass over the validation data."""

    step: int
    tokens: int
    loss: float
    loops: LoopStats
    batches: int


@dataclass(frozen=True)
class EventRecord:
    """Something that happened: start, resume, checkpoint, stop, rollback, warning, failure."""

    step: int
    name: str
    message: str


Record = StepRecord | EvalRecord | EventRecord
