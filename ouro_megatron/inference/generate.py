"""Text from a looped model: sampling, and a record of how deep each token went."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.inference.decoder import CachePolicy, LoopDecoder
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.model.looplm import LoopLM


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens. Temperature 0 is greedy."""

    exit_policy: ExitPolicy = field(default_factory=ExitPolicy)
    max_loops: int = 4
    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    cache: CachePolicy = "exact"


@dataclass(frozen=True)
class GeneratedToken:
    token: int
    text: str
    depth: int
    """Loop whose prediction it is, 1-based; 0 for tokens of the prompt."""
    exit_probability: tuple[float, ...] = ()

    @property
    def is_prompt(self) -> bool:
        return self.depth == 0


def choose(logits_v: Tensor, settings: GenerationSettings, generator: torch.Generator) -> int:
    """The next token from fp32 logits [vocab]: greedy, or a draw after temperature, top-k and top-p."""
    if settings.temperature == 0.0:
        return int(logits_v.argmax())
    scaled = logits_v.cpu() / settings.temperature
    if settings.top_k is not None:
        threshold = scaled.topk(min(settings.top_k, scaled.numel())).values[-1]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if settings.top_p is not None:
        ordered, index = scaled.sort(descending=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        scaled[index[before >= settings.top_p]] = -torch.inf
    return int(torch.multinomial(scaled.softmax(0), 1, generator=generator))


def stream(lm: LoopLM, tokenizer: TextTokenizer, prompt: str, settings: GenerationSettings) -> Iterator[GeneratedToken]:
    """The prompt's tokens, then new ones until the end of the document or `max_tokens`.

    An empty prompt starts a new document. Raises RecipeError for settings out of range.
    """
    _check(settings)
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    decoder = LoopDecoder(lm, settings.exit_policy, settings.max_loops, settings.cache)
    generator = torch.Generator().manual_seed(settings.seed)
    text = _TextPieces(tokenizer)
    for token in ids:
        yield GeneratedToken(token, text.add(token), 0)
    waiting = ids
    for left in range(settings.max_tokens, 0, -1):
        prediction = decoder.feed(waiting)
        token = choose(prediction.logits_v, settings, generator)
        if token == tokenizer.eod:
            return
        piece = text.add(token, last=left == 1)
        yield GeneratedToken(token, piece, prediction.depth, tuple(prediction.exit_probability))
        waiting = [token]


def _check(settings: GenerationSettings) -> None:
    if settings.temperature < 0:
        raise RecipeError(f"--temperature {settings.temperature}: 0 (greedy) or more")
    if settings.top_k is not None and settings.top_k < 1:
        raise RecipeError(f"--top-k {settings.top_k}: at least 1")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise RecipeError(f"--top-p {settings.top_p}: above 0 and up to 1")


class _TextPieces:
    """What each token adds to the text; a character of several tokens appears with its last one."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def add(self, token: int, *, last: bool = False) -> str:
        """`last`: nothing follows, so an unfinished character is shown as U+FFFD."""
        if token == self._tokenizer.eod:
            return ""
        self._pending.append(token)
        piece = self._tokenizer.decode(self._pending)
        if piece.endswith("\ufffd") and len(self._pending) < 4 and not last:
            return ""
        self._pending = []
        return piece


def save_sample(
    path: Path, prompt: str, checkpoint: Path, exit_policy: ExitPolicy, tokens: list[GeneratedToken]
) -> None:
    """Appends one sample to a JSON list that the report shows. Raises DataError when the file is not such a list."""
    samples: object = []
    if path.exists():
        try:
            samples = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): name another file") from error
    if not isinstance(samples, list):
        raise DataError(f"{path} is not a list of samples: name another file")
    samples.append(
        {
            "prompt": prompt,
            "exit": str(exit_policy),
            "checkpoint": str(checkpoint),
            "tokens": [{"text": t.text, "depth": t.depth, "prompt": t.is_prompt} for t in tokens],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(samples, indent=1), encoding="utf-8")
    partial.replace(path)
