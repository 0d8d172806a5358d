"""One sequence under way: which positions visit the layers next, at which loop, and what its tokens say so far."""

from typing import Literal

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.inference.attention import Segment
from ouro_megatron.inference.cache import CachePolicy
from ouro_megatron.inference.exit_policy import ExitTracker
from ouro_megatron.inference.request import GeneratedToken, Request
from ouro_megatron.inference.runner import Finish
from ouro_megatron.inference.sampling import Sampler
from ouro_megatron.inference.text import StopText, TextPieces

SkippedLoops = Literal["later", "copy", "run"]
"""What becomes of the loops after a token's exit:

`later`: run when a later token first needs their keys and values, all missing positions together. Equal to running
every loop for every token, and loops that nobody needs are never run. Needs the cache of all loops.
`copy`: never run; deeper tokens find the exit loop's keys and values in their place (or what the shared cache keeps).
`run`: always run; the exit only chooses which loop's prediction is read.
"""


class Sequence:
    """The engine's record of a request that holds a slot."""

    def __init__(
        self,
        request_id: int,
        request: Request,
        slot: int,
        max_loops: int,
        cache: CachePolicy,
        skipped: SkippedLoops,
        tokenizer: TextTokenizer | None,
    ) -> None:
        self.id, self.request, self.slot, self.max_loops = request_id, request, slot, max_loops
        self._cache, self._skipped = cache, skipped
        self._tokens = list(request.prompt)
        self._reached = [0] * (max_loops + 1)
        """Positions that loop t has seen, by t; used by `later`."""
        self._first, self._end = 0, len(self._tokens)
        """The token or prompt under way: positions from `_first` to before `_end`."""
        self._loop = 0
        """Loops it has been through."""
        self._left: int | None = None
        self._tracker = ExitTracker(max_loops)
        self.sampler = Sampler(request.sampling)
        self._pieces = TextPieces(tokenizer) if tokenizer else None
        self._stop = StopText(request.stop)
        self.row_visits = 0
        """Rows times visits so far: what the sequence has cost."""
        self.generated = 0

    @property
    def last_position(self) -> int:
        """Of the token under way: the one that the next token follows."""
        return self._end - 1

    @property
    def in_prompt(self) -> bool:
        return self._first == 0

    @property
    def prompt_rows(self) -> int:
        """Rows that the prompt brings to each visit while it is under way."""
        return len(self.request.prompt) if self.in_prompt else 0

    @property
    def loop(self) -> int:
        return self._loop

    def next_segment(self) -> Segment:
        """The rows of the next visit."""
        loop = self._loop + 1
        start = self._reached[loop] if self._skipped == "later" else self._first
        tokens = tuple(self._tokens[start : self._end]) if loop == 1 else ()
        return Segment(self.slot, loop, start, self._end - start, tokens, prompt=start == 0)

    def visited(self, segment: Segment, gate_logit: float, change: float) -> tuple[float, bool]:
        """Takes note of a visit; returns (p_t, whether the newest token leaves the loop now)."""
        self._loop = segment.loop
        self._reached[segment.loop] = segment.end
        self.row_visits += segment.count
        if self._left is not None:
            return 0.0, False
        probability = self._tracker.add(gate_logit)
        policy = self.request.exit_policy
        if not policy.leaves(self._loop, self._tracker.cumulative, change, self.max_loops):
            return probability, False
        self._left = self._loop
        return probability, True

    @property
    def exit(self) -> tuple[int, tuple[float, ...]]:
        """(loop, p_1 .. p_loop) of the token that has left."""
        assert self._left is not None
        return self._left, tuple(self._tracker.probabilities)

    def add(self, token: GeneratedToken) -> tuple[str, bool]:
        """Takes the new token; returns (text that may be shown, whether a stop text is complete)."""
        self._tokens.append(token.token)
        self.generated += 1
        return self._stop.add(self._pieces.add(token.token)) if self._pieces else ("", False)

    def remaining_text(self) -> tuple[str, bool]:
        """What was held back, at the end; (text, whether it completes a stop text)."""
        if self._pieces is None:
            return "", False
        text, stopped = self._stop.add(self._pieces.finish())
        return (text, True) if stopped else (text + self._stop.finish(), False)

    def is_through(self) -> bool:
        """Whether the positions under way need no further loop now."""
        if self._left is None:
            return False
        # Prompts give every loop its entries, but where missing ones are made when they are needed.
        everything = self._skipped == "run" or (self.in_prompt and self._skipped != "later")
        return self._loop >= (self.max_loops if everything else self._left)

    def next_token(self) -> Finish | None:
        """Moves on to the token chosen last; returns what the cache has to do with the position before it."""
        position, prompt, loops_run = self.last_position, self.in_prompt, self._loop
        self._first, self._end = self._end, len(self._tokens)
        self._loop, self._left = 0, None
        self._tracker = ExitTracker(self.max_loops)
        if prompt:
            return None
        if self._cache in ("first", "average"):
            return Finish(self.slot, position, loops_run)
        if self._cache == "all" and self._skipped == "copy" and loops_run < self.max_loops:
            return Finish(self.slot, position, loops_run)
        return None
