"""A model that scores and generates by turns: one copy of its weights in memory, whichever the work at hand needs."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ouro_megatron.checkpoint.load import InferenceModel, load_for_inference
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.evaluation.evaluate import load_on_all_ranks
from ouro_megatron.evaluation.likelihood import Continuation, Scored, score_continuations
from ouro_megatron.inference.engine import Engine, EngineSettings
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.load import DTYPES, Dtype, make_runner
from ouro_megatron.inference.request import Request, Sampling
from ouro_megatron.inference.weights import take_weights

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from, and where to stop."""

    tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    text: str
    depth: float
    """Mean loop, 1-based, of its tokens; 0 for an empty answer."""
    tokens: int


class ModelSession:
    """The model at a path (checkpoint, run or published folder), in one process or tensor parallel under torchrun.

    `loops` and the exit policy are given with each call, so that one session serves a sweep over depths. Under torchrun
    all ranks make the same calls.
    """

    def __init__(self, path: Path, *, device: str = "cpu", batch: int = 8, dtype: Dtype = "fp32") -> None:
        self._path = path
        self._device = device
        self._batch = batch
        self._dtype = dtype
        self._scorer: InferenceModel | None = load_on_all_ranks(path, device)
        self._engine: Engine | None = None
        self.context = self._scorer.context
        self.recipe = self._scorer.recipe
        self.folder = self._scorer.folder
        self.tokenizer: TextTokenizer = self._scorer.tokenizer

    @property
    def trained_loops(self) -> int:
        return self.recipe.model.loops

    @property
    def max_length(self) -> int:
        """Tokens of the stage's sequences."""
        return self.recipe.data.sequence_length

    @property
    def model(self) -> InferenceModel:
        """The model for scoring and for reading states; takes the engine's place in memory."""
        if self._scorer is None:
            self._engine = None
            gc.collect()
            self._scorer = load_for_inference(self._path, self._device, self.context)
        return self._scorer

    def close(self) -> None:
        self._scorer = self._engine = None
        self.context.close()

    def score(
        self,
        requests: Sequence[Continuation],
        policy: ExitPolicy,
        loops: int,
        max_length: int,
        progress: Progress = lambda done: None,
    ) -> list[Scored]:
        """See `score_continuations`."""
        return score_continuations(
            self.model.lm,
            requests,
            policy,
            loops,
            batch=self._batch,
            max_length=max_length,
            pad=self.tokenizer.eod,
            progress=progress,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        policy: ExitPolicy,
        loops: int,
        max_length: int,
        progress: Progress = lambda done: None,
    ) -> list[Answer]:
        """An answer to each prompt, in order. Prompts must leave room for their answers in `max_length`."""
        engine = self._engine_for(loops, max_length)
        numbers: dict[int, int] = {}
        for number, prompt in enumerate(prompts):
            request = Request(
                prompt.tokens,
                prompt.max_tokens,
                policy,
                loops,
                prompt.sampling,
                prompt.stop,
                frozenset({self.tokenizer.eod}),
            )
            numbers[engine.submit(request)] = number
        texts = [""] * len(prompts)
        depths: list[list[int]] = [[] for _ in prompts]
        while engine.unfinished:
            for event in engine.step():
                number = numbers[event.request_id]
                if event.token is not None:
                    texts[number] += event.token.text
                    depths[number].append(event.token.depth)
                if event.finished is not None:
                    texts[number] += event.finished.text
                    progress(1)
        return [
            Answer(text, sum(depth) / len(depth) if depth else 0.0, len(depth))
            for text, depth in zip(texts, depths, strict=True)
        ]

    @torch.inference_mode()
    def _engine_for(self, loops: int, max_length: int) -> Engine:
        """An engine that holds at least so many loops and positions; takes the scorer's place in memory."""
        engine = self._engine
        if engine is not None and engine.settings.max_loops >= loops and engine.settings.context >= max_length:
            return engine
        model = self.model
        self._scorer = None
        settings = EngineSettings(slots=self._batch, context=max_length, max_loops=loops)
        weights = take_weights(model.lm, DTYPES[self._dtype], settings.slots)
        runner = make_runner(weights, settings, self.context)
        self._engine = Engine(runner, settings, self.tokenizer, self.recipe.model.vocab)
        return self._engine
