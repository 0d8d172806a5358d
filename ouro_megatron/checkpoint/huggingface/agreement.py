"""Do this project's model and an exported folder, loaded with transformers, say the same? Compared loop by loop."""

import gc
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.errors import CheckpointError
from ouro_megatron.model.looplm import LoopLM

LARGEST = 1e-3
"""Largest difference of a logit, relative to the largest logit, that still agrees. fp32 in another order of operations
stays below 1e-5; one wrong tensor is far above."""
MEAN = 1e-4
"""Mean difference relative to the mean size of a logit."""


@dataclass(frozen=True)
class LoopAgreement:
    """One loop's logits: ours against the exported model's, in fp32 on the same tokens."""

    loop: int
    largest: float
    mean: float
    argmax: float
    """Share of positions at which both have the same most likely token. Near ties can differ."""
    scale: float
    """Largest logit of ours."""
    mean_size: float
    rounded: float
    """Largest change of a logit that storing the weights in the exported dtype makes: not an error of the export."""
    rounded_argmax: float

    @property
    def holds(self) -> bool:
        # NaN compares false: logits that are not numbers never agree.
        return self.largest <= LARGEST * max(self.scale, 1e-6) and self.mean <= MEAN * max(self.mean_size, 1e-6)


@dataclass(frozen=True)
class Agreement:
    loops: list[LoopAgreement]
    tokens: int

    @property
    def holds(self) -> bool:
        return all(loop.holds for loop in self.loops)

    def table(self) -> str:
        """Plain text, one line a loop."""
        head = "loop  max |diff|  mean |diff|  same argmax   by rounding: max |diff|  same argmax"
        lines = [
            f"{loop.loop:4d}  {loop.largest:10.2e}  {loop.mean:11.2e}  {loop.argmax:10.2%}  "
            f"{loop.rounded:23.2e}  {loop.rounded_argmax:10.2%}" + ("" if loop.holds else "   <- off")
            for loop in self.loops
        ]
        return "\n".join([head, *lines])


def require_transformers(purpose: str) -> None:
    """Raises CheckpointError when transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(f"transformers is needed {purpose}: pip install 'ouro-megatron[hf]'")


def compare(checkpoint: Path, folder: Path, dtype: torch.dtype, *, sequences: int = 2, length: int = 64) -> Agreement:
    """Logits of every loop, on random tokens, of the checkpoint and of the exported folder, in fp32 on the CPU.

    Our weights are rounded to `dtype` first, as the exported ones are, so that only mistakes show; what the rounding
    itself changes is reported beside it. One model is in memory at a time.
    """
    model = load_for_inference(checkpoint)
    try:
        section = model.recipe.model
        length = min(length, model.recipe.data.sequence_length)
        generator = torch.Generator().manual_seed(0)
        tokens_bs = torch.randint(section.vocab, (sequences, length), generator=generator)
        exact = loop_logits(model.lm, tokens_bs, section.loops)
        with torch.no_grad():
            for parameter in model.lm.parameters():
                parameter.copy_(parameter.to(dtype))
        ours = loop_logits(model.lm, tokens_bs, section.loops)
    finally:
        model.context.close()
    del model
    gc.collect()
    theirs = transformers_logits(folder, tokens_bs, section.loops)
    rows = [_agreement(loop, *logits) for loop, logits in enumerate(zip(ours, theirs, exact, strict=True), start=1)]
    return Agreement(rows, tokens_bs.numel())


def _agreement(loop: int, ours: Tensor, theirs: Tensor, exact: Tensor) -> LoopAgreement:
    difference = (ours - theirs).abs()
    best = ours.argmax(-1)
    return LoopAgreement(
        loop,
        largest=float(difference.max()),
        mean=float(difference.mean()),
        argmax=float((best == theirs.argmax(-1)).float().mean()),
        scale=float(ours.abs().max()),
        mean_size=float(ours.abs().mean()),
        rounded=float((ours - exact).abs().max()),
        rounded_argmax=float((best == exact.argmax(-1)).float().mean()),
    )


@torch.inference_mode()
def loop_logits(lm: LoopLM, tokens_bs: Tensor, loops: int) -> list[Tensor]:
    """Logits [b, s, vocab] after each of `loops` loops, without a pipeline."""
    rotary = lm.rotary(torch.arange(tokens_bs.shape[1], device=lm.context.device))
    h_sbh = lm.embed(tokens_bs.to(lm.context.device))
    logits = []
    for _ in range(loops):
        h_sbh = lm.run_layers(h_sbh, rotary)
        logits.append(lm.full_logits(h_sbh).transpose(0, 1).float().cpu())
    return logits


@torch.inference_mode()
def transformers_logits(folder: Path, tokens_bs: Tensor, loops: int) -> list[Tensor]:
    """The same from an exported folder through transformers' AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder.name}: {error}") from error
    model.eval()
    return [model(tokens_bs, exit_at_step=loop, use_cache=False).logits.float() for loop in range(loops)]
