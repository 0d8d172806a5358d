"""Choosing the next token from logits."""

import torch
from torch import Tensor

from ouro_megatron.inference.request import Sampling

_NUCLEUS_GUESS = 256
"""Most nuclei are smaller; sorting so many is much cheaper than sorting the vocabulary."""


class Sampler:
    """Draws for one sequence. The draws depend on the seed, the logits and how many came before, on nothing else."""

    def __init__(self, sampling: Sampling) -> None:
        sampling.check()
        self._sampling = sampling
        # Seeds outside 64 bits are as good as their remainder.
        self._generator = torch.Generator().manual_seed(sampling.seed % 2**63)

    def choose(self, logits_v: Tensor) -> int:
        """The next token from fp32 logits [vocab]: the likeliest, or a draw after temperature, top-k and top-p."""
        settings = self._sampling
        if settings.temperature == 0.0 or settings.top_k == 1:
            return int(logits_v.argmax())
        logits_v = logits_v.cpu()
        # Subtracting the largest first keeps a tiny temperature from overflowing.
        scaled_v = (logits_v - logits_v.max()) / settings.temperature
        index = None
        if settings.top_k is not None and settings.top_k < scaled_v.numel():
            scaled_v, index = scaled_v.topk(settings.top_k)
        if settings.top_p is not None and settings.top_p < 1.0:
            scaled_v, kept = _nucleus(scaled_v, settings.top_p)
            index = kept if index is None else index[kept]
        drawn = int(torch.multinomial(scaled_v.softmax(0), 1, generator=self._generator))
        return drawn if index is None else int(index[drawn])


def _nucleus(scaled_v: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest entries whose probabilities reach top_p, likeliest first, and where they were."""
    total = scaled_v.exp().sum()
    for size in (min(_NUCLEUS_GUESS, scaled_v.numel()), scaled_v.numel()):
        ordered, index = scaled_v.topk(size)
        probability = ordered.exp() / total
        before = probability.cumsum(0) - probability
        inside = int((before < top_p).sum())
        if inside < size or size == scaled_v.numel():
            break
    return ordered[:inside], index[:inside]


def token_logprobs(logits_v: Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log probability of `token` and the `top` likeliest (token, log probability), at temperature 1."""
    logprobs_v = logits_v.log_softmax(0)
    likeliest = logprobs_v.topk(min(top, logprobs_v.numel()))
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return float(logprobs_v[token]), tuple(pairs)
