"""When things happen in a stage: batch sizes, learning rate, and what is due after a step. Pure arithmetic."""

import bisect
import math
from dataclasses import dataclass

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.spans import Span


@dataclass(frozen=True)
class BatchPoint:
    """One step of a stage: `step` steps lie before it."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    """Tokens before this step."""
    samples: int
    """Sequences of this step's global batch."""
    tokens: int


@dataclass(frozen=True)
class _Segment:
    """Steps of equal batch size."""

    first_step: int
    first_sample: int
    samples: int


class BatchPlan:
    """Batch size of every step of a stage, and where the stage ends.

    A ramp point takes effect at the first step that starts at or after its `after`. A budget in tokens that does not
    fall on a step's end is rounded up to whole steps. Work is proportional to the ramp's length, not the stage's.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._sequence = recipe.data.sequence_length
        segments = [_Segment(0, 0, recipe.batch.global_tokens // self._sequence)]
        for point in recipe.batch.ramp:
            step = _steps_until(segments[-1], point.after, self._sequence)
            segments.append(_after(segments[-1], step, point.global_tokens // self._sequence))
        self._segments = segments
        self._first_steps = [segment.first_step for segment in segments]
        total = recipe.budget.total
        if total is None:
            raise RecipeError(
                "budget.total is not known: budget.epochs counts the tokens of data.train, read them first"
            )
        if total.steps is not None:
            self.total_steps = total.steps
        else:
            assert total.tokens is not None
            last = next(
                segment
                for index, segment in reversed(list(enumerate(segments)))
                if index == 0 or segment.first_sample * self._sequence < total.tokens
            )
            self.total_steps = _steps_until(last, total, self._sequence)
        end = self.at(self.total_steps)
        self.total_samples = end.consumed_samples
        self.total_tokens = end.consumed_tokens

    def at(self, step: int) -> BatchPoint:
        """The step that `step` steps lie before; 0 is the first."""
        segment = self._segments[bisect.bisect_right(self._first_steps, step) - 1]
        consumed = segment.first_sample + (step - segment.first_step) * segment.samples
        return BatchPoint(step, consumed, consumed * self._sequence, segment.samples, segment.samples * self._sequence)

    def first_step_at(self, span: Span) -> int:
        """Steps before the first one that starts at or after `span` from the stage's start."""
        if span.steps is not None:
            return span.steps
        assert span.tokens is not None
        tokens = span.tokens
        segment = next(s for s in reversed(self._segments) if s.first_sample * self._sequence <= tokens)
        return _steps_until(segment, span, self._sequence)

    def tokens_of(self, span: Span) -> int:
        """A span from the stage's start in tokens: of the steps it counts when it counts steps."""
        if span.tokens is not None:
            return span.tokens
        assert span.steps is not None
        return self.at(span.steps).consumed_tokens


def _steps_until(segment: _Segment, span: Span, sequence: int) -> int:
    """First step, at or after the segment's first, that starts at or after `span`, all in this segment's batch size."""
    if span.steps is not None:
        return max(segment.first_step, span.steps)
    assert span.tokens is not None
    tokens = span.tokens - segment.first_sample * sequence
    return segment.first_step + max(0, math.ceil(tokens / (segment.samples * sequence)))


def _after(segment: _Segment, step: int, samples: int) -> _Segment:
    return _Segment(step, segment.first_sample + (step - segment.first_step) * segment.samples, samples)


class LoopPlan:
    """T, the loops of every step: `training.early_loops` one after the other, then `model.loops`."""

    def __init__(self, recipe: Recipe, plan: BatchPlan) -> None:
        self._last = recipe.model.loops
        self._early = [(plan.first_step_at(early.until), early.loops) for early in recipe.training.early_loops]

    def at(self, step: int) -> int:
        """Loops of the step that `step` steps lie before."""
        return next((loops for end, loops in self._early if step < end), self._last)


class LRSchedule:
    """Learning rate by tokens consumed, so that a batch ramp does not bend the curve."""

    def __init__(self, recipe: Recipe, plan: BatchPlan) -> None:
        schedule = recipe.schedule
        self._kind = schedule.kind
        self._peak, self._floor = recipe.optimizer.lr, schedule.min_lr
        self._plan = plan
        self._warmup = plan.tokens_of(schedule.warmup)
        self._total = plan.total_tokens
        decay = schedule.decay
        if decay is None:
            self._decay_start = self._total
        elif decay.tokens is not None:
            self._decay_start = self._total - decay.tokens
        else:
            assert decay.steps is not None
            self._decay_start = plan.at(max(0, plan.total_steps - decay.steps)).consumed_tokens

    def at(self, step: int) -> float:
        """Rate of the step that `step` steps lie before: taken at that step's end, so the first is not 0."""
        tokens = self._plan.at(step + 1).consumed_tokens
        if tokens < self._warmup:
            return self._peak * tokens / self._warmup
        if self._kind == "cosine":
            return self._between(0.5 * (1 + math.cos(math.pi * self._progress(tokens, self._warmup))))
        if self._kind == "wsd" and tokens > self._decay_start:
            return self._between(1.0 - self._progress(tokens, self._decay_start))
        return self._peak

    def _between(self, fraction: float) -> float:
        return self._floor + (self._peak - self._floor) * fraction

    def _progress(self, tokens: int, start: int) -> float:
        return min(1.0, (tokens - start) / max(1, self._total - start))


def is_due(every: Span | None, before: BatchPoint, after: BatchPoint) -> bool:
    """Whether a multiple of `every` was reached by going from `before` to `after`. Never without a span."""
    if every is None:
        return False
    if every.steps is not None:
        return after.step // every.steps > before.step // every.steps
    assert every.tokens is not None
    return after.consumed_tokens // every.tokens > before.consumed_tokens // every.tokens
