"""All stages of a pipeline on one axis: tokens that the model had seen, over its whole history."""

from collections.abc import Sequence
from dataclasses import dataclass

from ouro_megatron.telemetry.records import EvalRecord, StepRecord
from ouro_megatron.telemetry.run_reader import Stage


@dataclass(frozen=True)
class Span:
    """Where a stage lies on the axis."""

    stage: Stage
    start: int
    """Tokens before it."""
    branch: int
    """0 for the first line of descent; a stage beside another one of the same parent begins a new one."""


@dataclass(frozen=True)
class Timeline:
    """Steps and evaluations of all stages. Branches from one stage begin at the same place."""

    spans: Sequence[Span]

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> "Timeline":
        """Places the stages by their lineage; those that know none follow each other in the given order."""
        known = {stage.name for stage in stages}
        if not any(stage.parent in known for stage in stages):
            spans, total = [], 0
            for stage in stages:
                spans.append(Span(stage, total, 0))
                total += stage.tokens
            return cls(spans)
        branch_of: dict[str, int] = {}
        continued: set[str | None] = set()
        spans, branches = [], 0
        for stage in sorted(stages, key=lambda stage: (stage.tokens_before, stage.started)):
            parent = stage.parent if stage.parent in known else None
            if parent not in continued:
                branch = branch_of.get(parent, 0) if parent is not None else 0
            else:
                branches += 1
                branch = branches
            continued.add(parent)
            branch_of[stage.name] = branch
            spans.append(Span(stage, stage.tokens_before, branch))
        return cls(spans)

    @property
    def loops(self) -> int:
        return max((span.stage.loops for span in self.spans), default=1)

    @property
    def starts(self) -> list[int]:
        """Where stages begin, each place once, in order."""
        return sorted({span.start for span in self.spans})

    @property
    def end(self) -> int:
        return max((span.start + span.stage.tokens for span in self.spans), default=0)

    @property
    def branches(self) -> list[int]:
        return sorted({span.branch for span in self.spans})

    def steps(self, branch: int) -> list[tuple[int, StepRecord]]:
        """(tokens on the axis, record) of a branch."""
        return [(span.start + step.tokens, step) for span in self._of(branch) for step in span.stage.steps]

    def evaluations(self, branch: int) -> list[tuple[int, EvalRecord]]:
        """(tokens on the axis, record) of a branch."""
        return [(span.start + record.tokens, record) for span in self._of(branch) for record in span.stage.evaluations]

    def rollbacks(self) -> list[int]:
        """Tokens on the axis of the checkpoints that stages went back to."""
        found = []
        for span in self.spans:
            tokens = {step.step: step.tokens for step in span.stage.steps}
            places = [tokens.get(event.step, 0) for event in span.stage.events if event.name == "rollback"]
            found += [span.start + place for place in places]
        return found

    def _of(self, branch: int) -> list[Span]:
        return [span for span in self.spans if span.branch == branch]
