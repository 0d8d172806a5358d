"""Names of the metrics in Weights & Biases and TensorBoard: one group a question, the same in every stage."""

from ouro_megatron.telemetry.records import EvalRecord, LoopStats, Record, StepRecord

X_AXIS = "progress/tokens"
"""Tokens of the stage; what curves are drawn over."""


def metrics_of(record: Record) -> dict[str, float]:
    """Grouped metric names of a record; empty for events."""
    if isinstance(record, StepRecord):
        values = {
            "loss/total": record.loss,
            **_loops(record.loops, "loss", "exit"),
            "optim/lr": record.lr,
            "optim/grad_norm": record.grad_norm,
            "optim/skipped_steps": record.skipped_steps,
            "optim/rollbacks": record.rollbacks,
            "perf/tokens_per_s": record.tokens_per_second,
            "perf/step_seconds": record.seconds,
            X_AXIS: record.tokens,
            "progress/step": record.step,
            "progress/global_tokens": record.global_tokens,
            **{f"data/source_share/{name}": share for name, share in record.source_share.items()},
            **{f"system/{name}": value for name, value in record.system.items()},
        }
        if record.ranks is not None:
            values["perf/rank_seconds_min"] = record.ranks.fastest_seconds
            values["perf/rank_seconds_max"] = record.ranks.slowest_seconds
            values["perf/slowest_rank"] = record.ranks.slowest_rank
            values["perf/straggler_ratio"] = record.ranks.straggler_ratio
        if record.mfu is not None:
            values["perf/mfu"] = record.mfu
        return values
    if isinstance(record, EvalRecord):
        return {
            "held_out/total": record.loss,
            **_loops(record.loops, "held_out", "held_out_exit"),
            X_AXIS: record.tokens,
            "progress/step": record.step,
        }
    return {}


def _loops(loops: LoopStats, losses: str, exits: str) -> dict[str, float]:
    return {
        **{f"{losses}/loop_{t}": value for t, value in enumerate(loops.ce, start=1)},
        **{f"{exits}/p_{t}": value for t, value in enumerate(loops.exit_probability, start=1)},
        f"{exits}/entropy": loops.entropy,
        f"{exits}/expected_depth": loops.expected_depth,
    }
