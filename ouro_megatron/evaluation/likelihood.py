"""Log-likelihood of continuations under an exit policy: what multiple-choice benchmarks ask for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_megatron.evaluation.scores import loop_states
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.exit import exit_log_probs

_CHUNK = 512
"""Positions whose logits of all loops exist at one time."""


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after a context of at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Scored:
    logprob: float
    """Natural log, summed over the continuation's tokens."""
    greedy: bool
    """Whether greedy decoding would produce it."""
    depth: float
    """Mean loop, 1-based, at which its tokens left; with expected logits, the loops run."""


def score_continuations(
    lm: LoopLM,
    requests: Sequence[Continuation],
    policy: ExitPolicy,
    loops: int,
    *,
    batch: int = 8,
    max_length: int,
    pad: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scored]:
    """Scores all requests, the longest first, `batch` at a time; all tensor-parallel ranks call it together.

    Contexts are cut from the left to `max_length` tokens in all. Every token is read at the loop where `policy` lets it
    leave, of at most `loops`; the states that later tokens see are those of all loops, as with an exact cache.
    """
    policy.check(loops)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context) - len(requests[i].tokens))
    results: list[Scored | None] = [None] * len(requests)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for index, scored in zip(
            chosen, _score_batch(lm, [requests[i] for i in chosen], policy, loops, max_length, pad), strict=True
        ):
            results[index] = scored
        progress(len(chosen))
    return [scored for scored in results if scored is not None]


def _score_batch(
    lm: LoopLM, requests: list[Continuation], policy: ExitPolicy, loops: int, max_length: int, pad: int
) -> Iterator[Scored]:
    # The last token is only ever a label. Padding on the right is invisible to causal attention.
    rows = [[*request.context, *request.tokens][-(max_length + 1) :] for request in requests]
    counts = [min(len(request.tokens), len(row) - 1) for request, row in zip(requests, rows, strict=True)]
    longest = max(len(row) for row in rows) - 1
    tokens_bs = torch.full((len(rows), longest), pad)
    for b, row in enumerate(rows):
        tokens_bs[b, : len(row) - 1] = torch.tensor(row[:-1])
    where = [(b, s) for b, row in enumerate(rows) for s in range(len(row) - 1 - counts[b], len(row) - 1)]
    device = lm.context.device
    b_n, s_n = torch.tensor(where, device=device).T if where else torch.zeros(2, 0, dtype=torch.int64, device=device)
    labels_n = torch.tensor([rows[b][s + 1] for b, s in where], dtype=torch.int64, device=device)
    run = loops if policy.step is None else policy.step
    states_tnh = torch.stack([h_sbh[s_n, b_n] for h_sbh in loop_states(lm, tokens_bs, run)])
    logprob_n, greedy_n, depth_n = read_states(lm, states_tnh, labels_n, policy)
    at = 0
    for count in counts:
        part = slice(at, at + count)
        depth = float(depth_n[part].mean()) if count else 0.0
        yield Scored(float(logprob_n[part].sum()), bool(greedy_n[part].all()), depth)
        at += count


@torch.inference_mode()
def read_states(lm: LoopLM, states_tnh: Tensor, labels_n: Tensor, policy: ExitPolicy) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label fp64 [n], whether it is the most likely token [n], and exit loop fp64 [n]."""
    exits_n, p_tn = choose_exits(lm, states_tnh, policy)
    logprobs, greedy = [], []
    for start in range(0, len(labels_n), _CHUNK):
        part = slice(start, start + _CHUNK)
        if policy.expected:
            logits = torch.zeros(())
            for p_n, h_nh in zip(p_tn[:, part], states_tnh[:, part], strict=True):
                logits = logits.to(h_nh.device) + p_n[:, None] * _logits(lm, h_nh)
        else:
            logits = _logits(lm, states_tnh[exits_n[part], torch.arange(start, start + len(exits_n[part]))])
        picked = logits.double().log_softmax(-1).gather(1, labels_n[part, None]).squeeze(1)
        logprobs.append(picked)
        greedy.append(logits.argmax(-1) == labels_n[part])
    if not logprobs:
        empty = labels_n.new_zeros(0).double()
        return empty, empty.bool(), empty
    return torch.cat(logprobs), torch.cat(greedy), exits_n.double() + 1


def choose_exits(lm: LoopLM, states_tnh: Tensor, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
    """0-based loop each position leaves at [n], and its exit distribution fp32 [t, n]."""
    loops, positions = states_tnh.shape[:2]
    gates = [lm.gate_logits(h_nh[:, None]).reshape(-1) for h_nh in states_tnh]
    p_tn = exit_log_probs(torch.stack(gates)).exp()
    leaves_tn = torch.zeros(loops, positions, dtype=torch.bool, device=states_tnh.device)
    if policy.q is not None and policy.q < 1.0:
        leaves_tn = p_tn.cumsum(0) >= policy.q
    elif policy.change is not None:
        wide = states_tnh.float()
        leaves_tn[1:] = (wide[1:] - wide[:-1]).norm(dim=-1) < policy.change * wide[:-1].norm(dim=-1)
    leaves_tn[-1] = True
    return leaves_tn.int().argmax(0), p_tn


def _logits(lm: LoopLM, h_nh: Tensor) -> Tensor:
    return lm.full_logits(h_nh[:, None]).squeeze(1).float()
