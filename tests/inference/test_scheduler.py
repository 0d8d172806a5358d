"""The scheduler under arbitrary traffic: no slot leaks, every request ends exactly once, every one gets its turn."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_megatron.errors import RequestError
from ouro_megatron.inference.attention import Segment
from ouro_megatron.inference.cache import CachePolicy
from ouro_megatron.inference.engine import Engine, EngineSettings
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import Request, Sampling
from ouro_megatron.inference.runner import Finish, Mix, Read, Visited
from ouro_megatron.inference.sequence import SkippedLoops

VOCAB, CONTEXT, LOOPS = 8, 24, 3


@dataclass
class Ledger:
    """A model that only keeps book of which (loop, position) of each slot has been computed, and refuses nonsense."""

    slots: int
    shared: bool
    done: dict[int, list[int]] = field(default_factory=dict)
    """Slot -> positions that each loop has entries for, by loop from 1."""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def visit(self, segments: list[Segment], finished: list[Finish], *, changes: bool = False) -> Visited:
        for item in finished:
            assert self.done[item.slot][1] > item.position, "a position was settled that never ran"
            self.done[item.slot] = [max(count, item.position + 1) for count in self.done[item.slot]]
        assert len({segment.slot for segment in segments}) == len(segments) <= self.slots
        for segment in segments:
            assert 0 <= segment.slot < self.slots and segment.count > 0 and segment.end <= CONTEXT
            assert (segment.loop == 1) == bool(segment.tokens)
            if segment.loop == 1:
                assert len(segment.tokens) == segment.count
                if segment.start == 0:
                    self.done[segment.slot] = [0] * (LOOPS + 1)
            reached = self.done[segment.slot]
            assert segment.loop == 1 or reached[segment.loop - 1] >= segment.end, "a loop ran before the one before it"
            if segment.start and not self.shared:
                assert reached[segment.loop] >= segment.start, "an entry that attention reads is missing"
            reached[segment.loop] = segment.end
        gates = torch.randn(len(segments), generator=self.generator).tolist()
        return Visited(gates, torch.rand(len(segments), generator=self.generator).tolist())

    def logits(self, mixes: list[Mix], reads: list[Read]) -> Tensor:
        for read in reads:
            assert self.done[read.slot][1] == read.position + 1
        return torch.randn(len(reads), VOCAB, generator=self.generator)


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8).map(tuple),
    max_tokens=st.one_of(st.none(), st.integers(1, 16)),
    exit_policy=st.sampled_from(["all", "q=0.3", "q=0.7", "step=1", "change=0.5", "expected"]).map(ExitPolicy.parse),
    max_loops=st.one_of(st.none(), st.integers(1, LOOPS)),
    stop_ids=st.sampled_from([frozenset(), frozenset({1}), frozenset(range(VOCAB))]),
    sampling=st.just(Sampling(1.0)),
)
actions = st.lists(
    st.one_of(requests, st.integers(1, 12), st.just("step")),
    max_size=40,
)
"""Submit a request, cancel the n-th, or take a step."""


@settings(deadline=None, max_examples=150)
@given(actions, st.integers(1, 3), st.integers(1, 20), st.sampled_from(["later", "copy", "run", "shared"]))
def test_any_traffic_ends_well(todo: list[object], slots: int, prefill: int, form: str) -> None:
    cache: CachePolicy = "average" if form == "shared" else "all"
    skipped: SkippedLoops | None = None if form == "shared" else form  # type: ignore[assignment]
    sizes = EngineSettings(slots, CONTEXT, LOOPS, cache, skipped, prefill)
    engine = Engine(Ledger(slots, form == "shared"), sizes, None, VOCAB)
    ends: dict[int, int] = {}
    tokens: dict[int, int] = {}
    asked: dict[int, Request] = {}

    def take(events: list) -> None:  # type: ignore[type-arg]
        for event in events:
            assert ends[event.request_id] == 0, "something came after the end"
            tokens[event.request_id] += event.token is not None
            ends[event.request_id] += event.finished is not None

    for action in todo:
        if isinstance(action, Request):
            number = engine.submit(action)
            ends[number], tokens[number], asked[number] = 0, 0, action
        elif action == "step":
            take(engine.step())
        else:
            event = engine.cancel(action)  # type: ignore[arg-type]
            take([event] if event else [])
        assert engine.running + engine.free_slots == slots
    for _ in range(len(asked) * CONTEXT * LOOPS + 1):
        take(engine.step())
    assert engine.unfinished == 0 and engine.free_slots == slots
    assert all(count == 1 for count in ends.values())
    for number, request in asked.items():
        assert tokens[number] <= (request.max_tokens or CONTEXT - len(request.prompt))


def engine() -> Engine:
    return Engine(Ledger(2, False), EngineSettings(2, CONTEXT, LOOPS), None, VOCAB)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "empty"),
        (Request((VOCAB,)), "outside 0..7"),
        (Request((-1,)), "outside 0..7"),
        (Request((1,) * CONTEXT), "has 24 tokens and the context holds 24"),
        (Request((1,) * 20, 5), "ask for at most 4"),
        (Request((1,), 0), "max_tokens 0"),
        (Request((1,), max_loops=4), "max_loops 4: 1 to 3"),
        (Request((1,), max_loops=0), "max_loops 0: 1 to 3"),
        (Request((1,), max_loops=2, exit_policy=ExitPolicy(step=3)), "step=3 lies beyond 2 loops"),
        (Request((1,), sampling=Sampling(-1.0)), "temperature"),
    ],
)
def test_requests_that_cannot_be_served(request_: Request, message: str) -> None:
    made = engine()
    with pytest.raises(RequestError, match=message):
        made.submit(request_)
    assert made.unfinished == 0


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(RequestError, match="later needs the entries of each loop"):
        EngineSettings(cache="last", skipped="later").check()
    with pytest.raises(RequestError, match="slots 0"):
        EngineSettings(slots=0).check()


def test_long_prompts_join_one_after_the_other() -> None:
    made = Engine(Ledger(3, False), EngineSettings(3, CONTEXT, LOOPS, skipped="run", prefill_tokens=10), None, VOCAB)
    for _ in range(3):
        made.submit(Request((1,) * 8, 9, sampling=Sampling(1.0)))
    made.step()
    assert made.running == 1
    for _ in range(LOOPS):
        made.step()
    assert made.running == 2
