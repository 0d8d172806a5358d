"""Many prompts to text at once, and what `ouro generate` writes about them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError, RequestError
from ouro_megatron.inference.engine import Engine
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.load import OpenModel
from ouro_megatron.inference.request import Event, Finished, GeneratedToken, Request, Sampling
from ouro_megatron.inference.text import TextPieces

DEFAULT_TOKENS = 64


class PromptLine(BaseModel):
    """One line of a JSON prompts file; what is left out is as on the command line."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    max_tokens: int | None = None
    exit: str | None = None
    max_loops: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: list[str] | None = None


@dataclass
class Completion:
    """One prompt's answer as it grows."""

    index: int
    prompt: str
    request: Request
    tokens: list[GeneratedToken] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished else "")

    @property
    def depths(self) -> list[int]:
        return [token.depth for token in self.tokens]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        assert self.finished is not None
        depths = self.depths
        return {
            "index": self.index,
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.finished.reason,
            "exit": str(self.request.exit_policy),
            "tokens": [token.token for token in self.tokens],
            "depths": depths,
            "mean_depth": sum(depths) / len(depths) if depths else None,
            "prompt_tokens": len(self.request.prompt),
            "layer_visits": self.finished.row_visits,
        }


def read_prompts(path: Path) -> list[PromptLine]:
    """Prompts of a file: JSON objects, one a line, in a .jsonl file, plain text, one prompt a line, in any other.

    Empty lines are left out. Raises DataError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(PromptLine.model_validate_json(line) if path.suffix == ".jsonl" else PromptLine(prompt=line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}:{number}: {where + ': ' if where else ''}{first['msg']}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def make_request(line: PromptLine, defaults: Request, model: OpenModel) -> Request:
    """`defaults` with the line's own settings. An empty prompt starts a new document.

    Without a number of tokens it asks for DEFAULT_TOKENS, or as many as the context has room for.
    """
    prompt = tuple(model.tokenizer.encode(line.prompt) or [model.tokenizer.eod])
    own = {
        name: value for name in ("temperature", "top_k", "top_p", "seed") if (value := getattr(line, name)) is not None
    }
    room = model.engine.settings.context - len(prompt)
    asked = line.max_tokens or defaults.max_tokens
    return replace(
        defaults,
        prompt=prompt,
        max_tokens=max(1, min(DEFAULT_TOKENS, room)) if asked is None else asked,
        exit_policy=ExitPolicy.parse(line.exit) if line.exit is not None else defaults.exit_policy,
        max_loops=line.max_loops or defaults.max_loops,
        sampling=replace(defaults.sampling, **own),
        stop=tuple(line.stop) if line.stop is not None else defaults.stop,
        stop_ids=defaults.stop_ids | model.stop_ids,
    )


def complete(engine: Engine, completions: list[Completion]) -> Iterator[tuple[Completion, Event]]:
    """Runs all of them together; yields each event with the completion it belongs to, already updated.

    Raises RequestError, naming the prompt, before anything is computed when one of them cannot be served.
    """
    for item in completions:
        try:
            engine.check(item.request)
        except RequestError as error:
            which = f"prompt {item.index + 1}: " if len(completions) > 1 else ""
            raise RequestError(f"{which}{error}", field=error.field) from error
    by_id = {engine.submit(item.request): item for item in completions}
    while engine.unfinished:
        for event in engine.step():
            item = by_id[event.request_id]
            if event.token is not None:
                item.tokens.append(event.token)
            if event.finished is not None:
                item.finished = event.finished
            yield item, event


def default_request(
    exit_policy: ExitPolicy, max_loops: int | None, max_tokens: int | None, sampling: Sampling, stop: list[str]
) -> Request:
    """What lines and prompts of one command share. Raises RequestError for settings out of range."""
    sampling.check()
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"--max-tokens {max_tokens}: at least 1", field="max_tokens")
    return Request((), max_tokens, exit_policy, max_loops, sampling, tuple(stop))


def save_sample(path: Path, completion: Completion, checkpoint: Path, tokenizer: TextTokenizer) -> None:
    """Appends one sample to a JSON list that the report shows. Raises DataError when the file is not such a list."""
    samples: object = []
    if path.exists():
        try:
            samples = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): name another file") from error
    if not isinstance(samples, list):
        raise DataError(f"{path} is not a list of samples: name another file")
    pieces = TextPieces(tokenizer)
    prompt = [{"text": pieces.add(token), "depth": 0, "prompt": True} for token in completion.request.prompt]
    if not completion.prompt:
        prompt = []
    samples.append(
        {
            "prompt": completion.prompt,
            "exit": str(completion.request.exit_policy),
            "checkpoint": str(checkpoint),
            "tokens": [*prompt, *({"text": t.text, "depth": t.depth, "prompt": False} for t in completion.tokens)],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(samples, indent=1), encoding="utf-8")
    partial.replace(path)
