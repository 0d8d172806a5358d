"""What is asked of the engine and what it answers."""

from dataclasses import dataclass, field
from typing import Literal

from ouro_megatron.errors import RequestError
from ouro_megatron.inference.exit_policy import ExitPolicy

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises RequestError that names the setting out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature {self.temperature}: 0 (greedy) or more", field="temperature")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k {self.top_k}: at least 1", field="top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p}: above 0 and up to 1", field="top_p")


@dataclass(frozen=True)
class Request:
    """One sequence to go on with."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int | None = None
    """None: as many as the context has room for."""
    exit_policy: ExitPolicy = field(default_factory=ExitPolicy)
    max_loops: int | None = None
    """None: the engine's."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end the sequence; they are not part of the answer."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence; they are not part of the answer."""
    logprobs: int | None = None
    """Report each token's log probability (at temperature 1), and those of this many of the likeliest."""


@dataclass(frozen=True)
class GeneratedToken:
    """One new token."""

    token: int
    text: str
    """What it adds to the text that may be shown: empty while a character or a stop text may still be going on."""
    depth: int
    """Loop whose prediction it is, 1-based; with expected logits, the loops run."""
    exit_probability: tuple[float, ...] = ()
    """p_1 .. p_depth."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a sequence."""

    reason: FinishReason
    text: str = ""
    """What was held back until now."""
    row_visits: int = 0
    """Positions times visits of the layers that the sequence took, its prompt included."""
    message: str = ""
    """What went wrong, for `error`."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a request in one step of the engine: a token, the end, or both."""

    request_id: int
    token: GeneratedToken | None = None
    finished: Finished | None = None
