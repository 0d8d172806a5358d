"""Decoding with each cache policy as its table defines it: one token, one loop, one layer at a time, plain lists."""

import math

import torch
from torch import Tensor

from tests.reference.looplm import Attention, ReferenceLoopLM, rotate

KeyValue = tuple[Tensor, Tensor]
"""[g, d] each, the key rotated."""


def _rotated(x_nd: Tensor, position: int, base: float) -> Tensor:
    padded = torch.zeros(x_nd.shape[0], position + 1, x_nd.shape[1])
    padded[:, position] = x_nd
    return rotate(padded, base)[:, position]


def _attend(attention: Attention, x_h: Tensor, position: int, past: list[KeyValue]) -> tuple[Tensor, KeyValue]:
    dim, groups = attention.dim, attention.kv_heads
    q = _rotated(attention.q_proj(x_h).view(attention.heads, dim), position, attention.base)
    own = (
        _rotated(attention.k_proj(x_h).view(groups, dim), position, attention.base),
        attention.v_proj(x_h).view(groups, dim),
    )
    keys = torch.stack([key for key, _ in [*past, own]], dim=1).repeat_interleave(attention.heads // groups, 0)
    values = torch.stack([value for _, value in [*past, own]], dim=1).repeat_interleave(attention.heads // groups, 0)
    weights = (torch.einsum("nd,nsd->ns", q, keys) / math.sqrt(dim)).softmax(-1)
    return attention.o_proj(torch.einsum("ns,nsd->nd", weights, values).flatten()), own


class Stepwise:
    """One sequence. `entries[loop][layer][position]` for `all`, `shared[layer][position]` for the others."""

    def __init__(self, reference: ReferenceLoopLM, loops: int, cache: str, run_all: bool) -> None:
        self.reference, self.loops, self.cache, self.run_all = reference, loops, cache, run_all
        layers = len(reference.model.layers)
        self.entries: list[list[list[KeyValue]]] = [[[] for _ in range(layers)] for _ in range(loops)]
        self.shared: list[list[KeyValue]] = [[] for _ in range(layers)]
        self.position = 0

    def _visit(self, h: Tensor, loop: int, prompt: bool) -> tuple[Tensor, list[KeyValue]]:
        own = []
        for index, layer in enumerate(self.reference.model.layers):
            past = self.entries[loop][index] if prompt or self.cache == "all" else self.shared[index]
            out, pair = _attend(layer.self_attn, layer.input_layernorm(h), self.position, past)
            h = h + layer.input_layernorm_2(out)
            h = h + layer.post_attention_layernorm_2(layer.mlp(layer.post_attention_layernorm(h)))
            own.append(pair)
        return self.reference.model.norm(h), own

    @torch.no_grad()
    def feed(self, token: int, q: float, prompt: bool) -> tuple[int, Tensor]:
        """(exit loop, logits [vocab]) after one more token under Q-exit."""
        h = self.reference.model.embed_tokens(torch.tensor(token))
        survival, cumulative = 1.0, 0.0
        left: tuple[int, Tensor] | None = None
        made: list[list[KeyValue]] = []
        for loop in range(self.loops):
            h, own = self._visit(h, loop, prompt)
            made.append(own)
            if prompt:  # the next token of the prompt sees each loop's own
                for index, pair in enumerate(own):
                    self.entries[loop][index].append(pair)
            gate = float(torch.sigmoid(self.reference.model.early_exit_gate(h)))
            cumulative += survival if loop == self.loops - 1 else gate * survival
            survival *= 1 - gate
            if left is None and (cumulative >= q or loop == self.loops - 1):
                left = loop + 1, self.reference.lm_head(h)
                if not prompt and not self.run_all:
                    break
        self._keep(made, prompt)
        self.position += 1
        assert left is not None
        return left

    def _keep(self, made: list[list[KeyValue]], prompt: bool) -> None:
        for index in range(len(self.shared)):
            pairs = [own[index] for own in made]
            kept = {
                "all": pairs[-1],
                "last": pairs[-1],
                "first": pairs[0],
                "average": (sum_of([k for k, _ in pairs]) / len(pairs), sum_of([v for _, v in pairs]) / len(pairs)),
            }[self.cache]
            self.shared[index].append(kept)
            if self.cache == "all" and not prompt:
                for loop in range(self.loops):
                    self.entries[loop][index].append(pairs[min(loop, len(pairs) - 1)])


def sum_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def stepwise(
    reference: ReferenceLoopLM, prompt: list[int], new: int, *, loops: int, cache: str, run_all: bool, q: float
) -> tuple[list[int], list[int], list[Tensor]]:
    """Greedy (tokens, depths, logits)."""
    model = Stepwise(reference, loops, cache, run_all)
    tokens, depths, logits = [], [], []
    for token in prompt:
        depth, logits_v = model.feed(token, q, prompt=True)
    for _ in range(new):
        tokens.append(int(logits_v.argmax()))
        depths.append(depth)
        logits.append(logits_v)
        depth, logits_v = model.feed(tokens[-1], q, prompt=False)
    return tokens, depths, logits
