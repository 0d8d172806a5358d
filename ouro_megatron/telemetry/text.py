"""Numbers and records as short text for the console."""

from ouro_megatron.telemetry.records import EvalRecord, StepRecord


def big(number: float) -> str:
    """1234 -> "1.23k", 2.6e9 -> "2.60B"."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """93784 -> "1d 2h", 3700 -> "1h 01m", 75 -> "1m 15s"."""
    whole = round(seconds)
    if whole >= 86_400:
        return f"{whole // 86_400}d {whole % 86_400 // 3600}h"
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def per_loop(ce: list[float]) -> str:
    """Cross-entropies of the loops, the first and the last ones when there are many."""
    shown = [f"{value:.3f}" for value in ce]
    return " ".join(shown if len(shown) <= 6 else [*shown[:3], "..", *shown[-2:]])


def step_line(record: StepRecord, eta: float) -> str:
    """One line a step."""
    parts = [
        f"step {record.step}/{record.total_steps}",
        f"tokens {big(record.tokens)}",
        f"loss {record.loss:.4f}",
        f"by loop {per_loop(record.loops.ce)}",
        f"depth {record.loops.expected_depth:.2f}",
        f"grad {record.grad_norm:.3f}",
        f"lr {record.lr:.2e}",
        f"{big(record.tokens_per_second)} tok/s",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    parts.append(f"ETA {duration(eta)}")
    if record.skipped_steps:
        parts.append(f"skipped {record.skipped_steps}")
    return " | ".join(parts)


def evaluation_line(record: EvalRecord) -> str:
    return (
        f"held out at step {record.step}: loss {record.loss:.4f} | by loop {per_loop(record.loops.ce)} | "
        f"depth {record.loops.expected_depth:.2f}"
    )
