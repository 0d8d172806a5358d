"""Continuous batching over sequences and over depth: each step takes every running sequence once through the layers,
each at its own loop. Sequences join and leave between steps."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import RequestError
from ouro_megatron.inference.attention import Segment
from ouro_megatron.inference.cache import CachePolicy
from ouro_megatron.inference.request import Event, Finished, FinishReason, GeneratedToken, Request
from ouro_megatron.inference.runner import Finish, Mix, Read, Visited
from ouro_megatron.inference.sampling import token_logprobs
from ouro_megatron.inference.sequence import Sequence, SkippedLoops


class Visits(Protocol):
    """What the engine asks of a model: a `Runner`, or one that takes other ranks along."""

    def visit(self, segments: list[Segment], finished: list[Finish], *, changes: bool = False) -> Visited: ...

    def logits(self, mixes: list[Mix], reads: list[Read]) -> Tensor: ...


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and policies that all requests share."""

    slots: int = 8
    """Sequences that run at one time."""
    context: int = 2048
    """Longest sequence, prompt and answer, in tokens."""
    max_loops: int = 4
    """Most loops of any request; may be more than the model was trained with."""
    cache: CachePolicy = "all"
    skipped: SkippedLoops | None = None
    """None: `later` with the cache of all loops, `copy` with a shared one."""
    prefill_tokens: int = 4096
    """Prompts join while those under way have at most this many tokens together (a longer one joins alone)."""

    @property
    def skipped_loops(self) -> SkippedLoops:
        return self.skipped or ("later" if self.cache == "all" else "copy")

    def check(self) -> None:
        """Raises RequestError for values that do not fit together."""
        for name in ("slots", "context", "max_loops", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name.replace('_', '-')} {getattr(self, name)}: at least 1", field=name)
        if self.skipped == "later" and self.cache != "all":
            raise RequestError(
                f"skipped=later needs the entries of each loop, cache={self.cache} keeps one for all: "
                "use cache=all, or skipped=copy",
                field="skipped",
            )


class Engine:
    """Requests in, events out. Not thread-safe: one thread calls it."""

    def __init__(self, model: Visits, settings: EngineSettings, tokenizer: TextTokenizer | None, vocab: int) -> None:
        """Without a tokenizer there are tokens but no text."""
        settings.check()
        self.settings = settings
        self._model = model
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._free = list(range(settings.slots))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Sequence] = {}
        self._finished: list[Finish] = []
        self._next_id = 0

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never be served. May be called from any thread."""
        settings = self.settings
        if not request.prompt:
            raise RequestError("the prompt is empty: give at least one token", field="prompt")
        if not all(0 <= token < self._vocab for token in request.prompt):
            raise RequestError(f"the prompt has a token id outside 0..{self._vocab - 1}", field="prompt")
        if len(request.prompt) >= settings.context:
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens and the context holds {settings.context}, "
                "the answer included: shorten it or raise --context",
                field="prompt",
            )
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens {request.max_tokens}: at least 1", field="max_tokens")
        if len(request.prompt) + (request.max_tokens or 0) > settings.context:
            room = settings.context - len(request.prompt)
            raise RequestError(
                f"the prompt has {len(request.prompt)} tokens, so max_tokens {request.max_tokens} does not fit into "
                f"the context of {settings.context}: ask for at most {room} or raise --context",
                field="max_tokens",
            )
        loops = self._loops_of(request)
        if not 1 <= loops <= settings.max_loops:
            raise RequestError(f"max_loops {loops}: 1 to {settings.max_loops} here (--max-loops)", field="max_loops")
        request.exit_policy.check(loops)
        request.sampling.check()

    def _loops_of(self, request: Request) -> int:
        return self.settings.max_loops if request.max_loops is None else request.max_loops

    def submit(self, request: Request) -> int:
        """Queues a request; returns its id. Raises RequestError as `check` does."""
        self.check(request)
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> Event | None:
        """Ends a request; returns its last event, or None when it is over already."""
        sequence = self._running.get(request_id)
        if sequence is not None:
            return self._end(sequence, "cancelled")
        for item in self._waiting:
            if item[0] == request_id:
                self._waiting.remove(item)
                return Event(request_id, finished=Finished("cancelled"))
        return None

    def step(self) -> list[Event]:
        """One visit of the layers for all running sequences. Without any, returns at once."""
        self._admit()
        if not self._running:
            return []
        order = sorted(((s.next_segment(), s) for s in self._running.values()), key=lambda pair: self._place(pair[0]))
        segments = [segment for segment, _ in order]
        changes = any(s.request.exit_policy.change is not None for s in self._running.values())
        finished, self._finished = self._finished, []
        visited = self._model.visit(segments, finished, changes=changes)
        mixes: list[Mix] = []
        leaving: list[Sequence] = []
        for (segment, sequence), gate, change in zip(order, visited.gate_logits, visited.changes, strict=True):
            probability, leaves = sequence.visited(segment, gate, change)
            if sequence.request.exit_policy.expected:
                mixes.append(Mix(sequence.slot, sequence.last_position, probability, segment.loop == 1))
            if leaves:
                leaving.append(sequence)
        events = self._choose(leaving, mixes)
        for sequence in self._running.values():
            if sequence.is_through():
                finish = sequence.next_token()
                self._finished += [finish] if finish else []
        return events

    def _place(self, segment: Segment) -> tuple[bool, int, int]:
        """Single tokens of one cache entry by slot, so that neighbours attend in one call; then longer segments."""
        return segment.prompt or segment.count > 1, segment.loop if self.settings.cache == "all" else 0, segment.slot

    def _admit(self) -> None:
        under_way = sum(sequence.prompt_rows for sequence in self._running.values())
        while self._waiting and self._free:
            request_id, request = self._waiting[0]
            if under_way and under_way + len(request.prompt) > self.settings.prefill_tokens:
                return
            self._waiting.popleft()
            under_way += len(request.prompt)
            slot = min(self._free)
            self._free.remove(slot)
            settings = self.settings
            self._running[request_id] = Sequence(
                request_id,
                request,
                slot,
                self._loops_of(request),
                settings.cache,
                settings.skipped_loops,
                self._tokenizer,
            )

    def _choose(self, leaving: list[Sequence], mixes: list[Mix]) -> list[Event]:
        if not leaving and not mixes:
            return []
        reads = [Read(s.slot, s.last_position, s.request.exit_policy.expected) for s in leaving]
        logits = self._model.logits(mixes, reads)
        return [event for row, sequence in enumerate(leaving) for event in self._take(sequence, logits[row])]

    def _take(self, sequence: Sequence, logits_v: Tensor) -> list[Event]:
        """Chooses the next token of a sequence whose newest one has left; ends the sequence where it should end."""
        request = sequence.request
        token = sequence.sampler.choose(logits_v)
        if token in request.stop_ids:
            return [self._end(sequence, "stop")]
        depth, probabilities = sequence.exit
        logprob, top = (None, ()) if request.logprobs is None else token_logprobs(logits_v, token, request.logprobs)
        made = GeneratedToken(token, "", depth, probabilities, logprob, top)
        text, stopped = sequence.add(made)
        made = GeneratedToken(token, text, depth, probabilities, logprob, top)
        if stopped:
            return [Event(sequence.id, made), self._end(sequence, "stop", flush=False)]
        limit = self.settings.context - len(request.prompt)
        if sequence.generated >= min(limit, request.max_tokens or limit):
            return [Event(sequence.id, made), self._end(sequence, "length")]
        return [Event(sequence.id, made)]

    def _end(self, sequence: Sequence, reason: FinishReason, *, flush: bool = True) -> Event:
        """Frees the slot. Everything that was said about it is dropped with it."""
        del self._running[sequence.id]
        self._free.append(sequence.slot)
        self._finished = [item for item in self._finished if item.slot != sequence.slot]
        text, stopped = sequence.remaining_text() if flush else ("", False)
        return Event(
            sequence.id, finished=Finished("stop" if stopped else reason, text, row_visits=sequence.row_visits)
        )
