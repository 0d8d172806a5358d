"""What looping buys, from the scores of every token after every loop. Pure functions over arrays."""

import math
from dataclasses import dataclass

import numpy as np

from ouro_megatron.evaluation.scores import TokenScores

Q_GRID = tuple(round(0.05 * step, 2) for step in range(21))
HELPED = 0.005
"""Nats by which a loop must lower the loss to count as helping: the gate objective's threshold (arXiv 2510.25741)."""


@dataclass(frozen=True)
class LoopQuality:
    """One loop's predictions over all tokens."""

    loop: int
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    accuracy: float
    """Share of tokens that are the most likely one."""
    exit_probability: float
    """Mean p_t with the loops the model was trained with; 0 beyond them."""


@dataclass(frozen=True)
class CurvePoint:
    """Q-exit at one q."""

    q: float
    mean_loops: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class CalibrationBin:
    """Tokens whose gate says about the same at one loop."""

    stop: float
    """Mean lambda_t: the share that the gate lets go."""
    next_gain: float
    """Mean nats that the next loop saves."""
    rest_gain: float
    """Mean nats that all loops left save."""
    helped: float
    """Share of tokens that the next loop helps by more than `HELPED`."""
    tokens: int


@dataclass(frozen=True)
class LoopCalibration:
    """Does the gate stop after this loop where the next one does not help?"""

    loop: int
    auc: float | None
    """Chance that a token that the next loop helps has a lower lambda_t than one it does not: 0.5 is a coin, 1 perfect.
    None when all tokens are of one kind."""
    error: float
    """Mean distance, weighted by tokens, between 1 - lambda_t and the share of tokens helped."""
    bins: list[CalibrationBin]


@dataclass(frozen=True)
class ClassDepth:
    """Tokens of one kind."""

    name: str
    tokens: int
    expected_depth: float
    first_loss: float
    last_loss: float


def loop_quality(scores: TokenScores, text_bytes: int, trained: int) -> list[LoopQuality]:
    """Loss, perplexity, bits per byte and accuracy of each loop of a model trained with `trained` loops."""
    exits_t = np.zeros(scores.loops)
    exits_t[:trained] = scores.first(trained).exit_probabilities().mean(1)
    rows = []
    for t in range(scores.loops):
        total = float(scores.ce_tn[t].sum(dtype=np.float64))
        loss = total / scores.tokens
        rows.append(
            LoopQuality(
                t + 1,
                loss,
                math.exp(min(loss, 700.0)),
                total / math.log(2) / text_bytes if text_bytes else math.nan,
                float(scores.correct_tn[t].mean()),
                float(exits_t[t]),
            )
        )
    return rows


def exit_loops(scores: TokenScores, q: float) -> np.ndarray:
    """0-based loop each token leaves at: the first whose CDF reaches q; at q = 1 the last. int64 [n]."""
    if q >= 1.0:
        return np.full(scores.tokens, scores.loops - 1)
    reached_tn = scores.exit_probabilities().cumsum(0) >= q
    reached_tn[-1] = True
    return reached_tn.argmax(0)


def exit_curve(scores: TokenScores, grid: tuple[float, ...] = Q_GRID) -> list[CurvePoint]:
    """Loss and accuracy against loops used, over q."""
    index_n = np.arange(scores.tokens)
    points = []
    for q in grid:
        exits_n = exit_loops(scores, q)
        points.append(
            CurvePoint(
                q,
                float(exits_n.mean()) + 1,
                float(scores.ce_tn[exits_n, index_n].mean(dtype=np.float64)),
                float(scores.correct_tn[exits_n, index_n].mean()),
            )
        )
    return points


def calibration(scores: TokenScores, bins: int = 10) -> list[LoopCalibration]:
    """For each loop but the last: tokens in equally full bins of lambda_t, and what further loops do for them."""
    stop_tn = scores.stop_probabilities()
    found = []
    for t in range(scores.loops - 1):
        next_gain_n = (scores.ce_tn[t] - scores.ce_tn[t + 1]).astype(np.float64)
        rest_gain_n = (scores.ce_tn[t] - scores.ce_tn[-1]).astype(np.float64)
        helped_n = next_gain_n > HELPED
        order = np.argsort(stop_tn[t], kind="stable")
        parts = [part for part in np.array_split(order, min(bins, scores.tokens)) if len(part)]
        rows = [
            CalibrationBin(
                float(stop_tn[t][part].mean()),
                float(next_gain_n[part].mean()),
                float(rest_gain_n[part].mean()),
                float(helped_n[part].mean()),
                len(part),
            )
            for part in parts
        ]
        error = sum(abs(1 - row.stop - row.helped) * row.tokens for row in rows) / scores.tokens
        found.append(LoopCalibration(t + 1, _auc(-stop_tn[t], helped_n), error, rows))
    return found


def _auc(score_n: np.ndarray, positive_n: np.ndarray) -> float | None:
    """Area under the ROC curve, ties counted half."""
    positives = int(positive_n.sum())
    negatives = len(positive_n) - positives
    if not positives or not negatives:
        return None
    _, where, counts = np.unique(score_n, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks_n = (last - (counts - 1) / 2)[where]
    return float((ranks_n[positive_n].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def depth_by_class(scores: TokenScores, classes_n: np.ndarray, names: tuple[str, ...]) -> list[ClassDepth]:
    """Expected depth sum_t t p_t by the kind of the token to predict; kinds that do not occur are left out."""
    steps_t = np.arange(1, scores.loops + 1)
    depth_n = steps_t @ scores.exit_probabilities()
    rows = []
    for kind, name in enumerate(names):
        chosen = classes_n == kind
        if chosen.any():
            rows.append(
                ClassDepth(
                    name,
                    int(chosen.sum()),
                    float(depth_n[chosen].mean()),
                    float(scores.ce_tn[0][chosen].mean(dtype=np.float64)),
                    float(scores.ce_tn[-1][chosen].mean(dtype=np.float64)),
                )
            )
    return rows
