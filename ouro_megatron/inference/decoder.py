"""Runs a looped model token by token and decides at which loop each token leaves."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ouro_megatron.errors import RecipeError
from ouro_megatron.inference.cache import LoopCache
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.exit import exit_step

CachePolicy = Literal["exact", "reuse"]


@dataclass(frozen=True)
class Prediction:
    """What the model says after the last token it was given."""

    logits_v: Tensor
    """Of the loop the token left at, fp32 [vocab]."""
    depth: int
    """That loop, 1-based."""
    exit_probability: list[float]
    """p_1 .. p_depth, as far as they were computed; with all loops run they add up to 1."""


class LoopDecoder:
    """Feeds one sequence to a model and predicts its next token, with a cache entry for each (loop, layer).

    `exact`: every loop runs for every token, and the exit only chooses which loop's logits are read. Equal to
    recomputing the whole sequence for each token. `reuse`: loops after the exit are not run; later tokens that go
    deeper find the exit loop's keys and values in their place. Saves the loops and changes the result slightly; what
    is fed first, the prompt, always runs through all loops.

    Works with tensor parallelism (all ranks call it alike); a pipeline is refused: load the checkpoint without one.
    """

    def __init__(
        self, lm: LoopLM, exit_policy: ExitPolicy, max_loops: int, cache_policy: CachePolicy = "exact"
    ) -> None:
        if lm.context.pipeline_size > 1 or lm.context.sequence_parallel:
            raise RecipeError("generation runs without pipeline and sequence parallelism: load the model without them")
        if max_loops < 1:
            raise RecipeError(f"--max-loops {max_loops}: at least 1")
        if exit_policy.step is not None and exit_policy.step > max_loops:
            raise RecipeError(f"--exit step={exit_policy.step} lies beyond --max-loops {max_loops}")
        self._lm = lm
        self._exit = exit_policy
        self._max_loops = max_loops
        self._policy = cache_policy
        self._cache = LoopCache(max_loops, len(lm.decoder.layers))

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._cache.length

    @torch.inference_mode()
    def feed(self, tokens: list[int]) -> Prediction:
        """Adds tokens to the sequence; returns the prediction after the last one."""
        if not tokens:
            raise ValueError("feed at least one token")
        lm, start = self._lm, self._cache.length
        device = lm.context.device
        rotary = lm.rotary(torch.arange(start, start + len(tokens), device=device))
        h_sbh = lm.embed(torch.tensor([tokens], device=device))
        may_stop = self._policy == "reuse" and start > 0
        log_survival_n = torch.zeros(1, device=device)
        probabilities: list[float] = []
        left: tuple[int, Tensor] | None = None
        for loop in range(1, self._max_loops + 1):
            h_sbh = lm.run_layers(h_sbh, rotary, self._cache.slots[loop - 1])  # type: ignore[arg-type]
            last_sbh = h_sbh[-1:]
            log_p_n, log_survival_n = exit_step(
                lm.gate_logits(last_sbh).reshape(-1), log_survival_n, last=loop == self._max_loops
            )
            probabilities.append(float(log_p_n.exp()))
            if left is None and self._exit.leaves(loop, sum(probabilities), self._max_loops):
                left = loop, last_sbh
                if may_stop:
                    self._cache.fill_deeper(loop, len(tokens))
                    break
        assert left is not None, "the last loop always lets go"
        self._cache.length += len(tokens)
        depth, state_sbh = left
        return Prediction(lm.full_logits(state_sbh).reshape(-1).float(), depth, probabilities)
