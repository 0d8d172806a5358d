"""The alternative a user would write: the same looped model in plain PyTorch, unrolled, with full logits per loop."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_megatron.recipe.schema import ModelSection


class PlainLayer(nn.Module):
    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        hidden = model.hidden
        self.heads, self.eps = model.heads, model.norm_eps
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in range(4)])
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * model.ffn, bias=False)
        self.down = nn.Linear(model.ffn, hidden, bias=False)

    def _norm(self, x: Tensor, index: int) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.norms[index], self.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (
            part.view(b, s, self.heads, -1).transpose(1, 2) for part in self.qkv(self._norm(x, 0)).chunk(3, dim=-1)
        )
        attention = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self._norm(self.out(attention.transpose(1, 2).reshape(b, s, h)), 1)
        gate, up = self.up(self._norm(x, 2)).chunk(2, dim=-1)
        return x + self._norm(self.down(F.silu(gate) * up), 3)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainLoopLM(nn.Module):
    """Expected-loss objective over the loops by autograd alone."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.layers = nn.ModuleList([PlainLayer(model) for _ in range(model.layers)])
        self.norm = nn.Parameter(torch.ones(model.hidden))
        self.gate = nn.Linear(model.hidden, 1)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)

    def cross_entropy(self, x_bsh: Tensor, labels_bs: Tensor) -> Tensor:
        """[b * s] in fp32, from logits of all tokens."""
        return F.cross_entropy(self.head(x_bsh).flatten(0, 1).float(), labels_bs.flatten(), reduction="none")

    def forward(self, tokens_bs: Tensor, labels_bs: Tensor, beta: float) -> Tensor:
        dim = self.model.hidden // self.model.heads
        x = self.embedding(tokens_bs)
        positions = torch.arange(tokens_bs.shape[1], device=x.device)[:, None]
        angles = positions / self.model.rope_base ** (torch.arange(0, dim, 2, device=x.device) / dim)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        losses, gates = [], []
        for _ in range(self.model.loops):
            for layer in self.layers:
                x = layer(x, cos, sin)
            x = F.rms_norm(x, (x.shape[-1],), self.norm, self.model.norm_eps)
            gates.append(self.gate(x).flatten().float())
            losses.append(self.cross_entropy(x, labels_bs))
        ce_tn, gate_tn = torch.stack(losses), torch.stack(gates)
        log_survival = F.logsigmoid(-gate_tn).cumsum(0)
        before = torch.cat((torch.zeros_like(log_survival[:1]), log_survival[:-1]))
        log_p_tn = torch.cat((F.logsigmoid(gate_tn[:-1]) + before[:-1], before[-1:]))
        p_tn = log_p_tn.exp()
        return ((p_tn * ce_tn).sum(0) + beta * (p_tn * log_p_tn).sum(0)).mean()
