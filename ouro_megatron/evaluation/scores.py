"""What a looped model says of every token after every loop: the raw material of the evaluation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.errors import RecipeError
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.exit import exit_log_probs

Batch = dict[str, Tensor]
"""tokens_bs int64, labels_bs int64, loss_mask_bs float32, as the training data gives them."""
_CHUNK = 1024
"""Tokens whose logits exist at one time."""


@dataclass(frozen=True)
class TokenScores:
    """n counted tokens (labels), T loops."""

    ce_tn: np.ndarray
    """Cross-entropy of the label in nats, fp32 [T, n]."""
    correct_tn: np.ndarray
    """Whether the label is the most likely token, bool [T, n]."""
    gate_tn: np.ndarray
    """Gate logits, fp32 [T, n]."""
    labels_n: np.ndarray
    """int64 [n]."""

    @property
    def loops(self) -> int:
        return int(self.ce_tn.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.ce_tn.shape[1])

    def first(self, loops: int) -> "TokenScores":
        """The same with no more than `loops` loops."""
        return TokenScores(self.ce_tn[:loops], self.correct_tn[:loops], self.gate_tn[:loops], self.labels_n)

    def exit_probabilities(self) -> np.ndarray:
        """p_t of every token, fp64 [T, n]; each column sums to 1."""
        return exit_log_probs(torch.from_numpy(self.gate_tn).double()).exp().numpy()

    def stop_probabilities(self) -> np.ndarray:
        """lambda_t = sigmoid(gate logit), fp64 [T, n]."""
        return torch.from_numpy(self.gate_tn).double().sigmoid().numpy()


def refuse_unsupported_layout(lm: LoopLM) -> None:
    """Raises RecipeError for a pipeline or sequence parallelism: evaluation runs whole models or tensor parallel."""
    if lm.context.pipeline_size > 1 or lm.context.sequence_parallel:
        raise RecipeError("evaluation runs without pipeline and sequence parallelism: load the model without them")


@torch.inference_mode()
def loop_states(lm: LoopLM, tokens_bs: Tensor, loops: int) -> Iterator[Tensor]:
    """h_1 .. h_T, the normed states [s, b, h] after each loop, for whole sequences from position 0."""
    refuse_unsupported_layout(lm)
    tokens_bs = tokens_bs.to(lm.context.device)
    rotary = lm.rotary(torch.arange(tokens_bs.shape[1], device=lm.context.device))
    h_sbh = lm.embed(tokens_bs)
    for _ in range(loops):
        h_sbh = lm.run_layers(h_sbh, rotary)
        yield h_sbh


@torch.inference_mode()
def label_scores(lm: LoopLM, h_nh: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy fp32 [n] and whether the label is the argmax [n], in chunks of tokens. All TP ranks call it."""
    ce, correct = [], []
    for h, labels in zip(h_nh.split(_CHUNK), labels_n.split(_CHUNK), strict=True):
        logits = lm.full_logits(h[:, None]).squeeze(1).float()
        ce.append(F.cross_entropy(logits, labels, reduction="none"))
        correct.append(logits.argmax(-1) == labels)
    return torch.cat(ce), torch.cat(correct)


@torch.inference_mode()
def score_tokens(lm: LoopLM, batches: Iterable[Batch], loops: int) -> TokenScores:
    """Runs `loops` loops (as many as one likes, also more than were trained) over all batches."""
    refuse_unsupported_layout(lm)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in batches:
        tokens_bs, labels_bs = (batch[key].to(lm.context.device) for key in ("tokens_bs", "labels_bs"))
        counted_n = batch["loss_mask_bs"].to(lm.context.device).t().reshape(-1) > 0
        labels_n = labels_bs.t().reshape(-1)[counted_n]
        rows = []
        for h_sbh in loop_states(lm, tokens_bs, loops):
            h_nh = h_sbh.reshape(-1, h_sbh.shape[-1])[counted_n]
            gate_n = lm.gate_logits(h_nh[:, None]).reshape(-1)
            rows.append((*label_scores(lm, h_nh, labels_n), gate_n))
        ce, correct, gate = (torch.stack(item).cpu().numpy() for item in zip(*rows, strict=True))
        parts.append((ce, correct, gate.astype(np.float32), labels_n.cpu().numpy()))
    ce_tn, correct_tn, gate_tn = (np.concatenate([part[i] for part in parts], axis=1) for i in range(3))
    return TokenScores(ce_tn, correct_tn, gate_tn, np.concatenate([part[3] for part in parts]))
