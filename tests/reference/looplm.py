"""The oracle: a looped language model as plainly as it can be written, one process, any dtype.

Parameter names are those of the published checkpoints. Nothing here is shared with ouro_megatron.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ReferenceConfig:
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    loops: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class ReferenceObjective:
    kind: Literal["expected_loss", "last_loop", "gate"] = "expected_loss"
    prior: Literal["uniform", "geometric"] = "uniform"
    beta: float = 0.1
    eta: float = 0.5
    slope: float = 50.0
    threshold: float = 0.005


class Norm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x_bnsd: Tensor, base: float) -> Tensor:
    """Rotate-half RoPE at positions 0..s-1."""
    s, d = x_bnsd.shape[-2:]
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(s, dtype=torch.float64)[:, None] * frequency[None, :]
    cos, sin = angle.cos().to(x_bnsd.dtype), angle.sin().to(x_bnsd.dtype)
    first, second = x_bnsd[..., : d // 2], x_bnsd[..., d // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.dim = config.head_dim or config.hidden // config.heads
        self.base = config.rope_base
        self.q_proj = nn.Linear(config.hidden, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden, bias=False)

    def forward(self, x_bsh: Tensor) -> Tensor:
        b, s, _ = x_bsh.shape
        q = self.q_proj(x_bsh).view(b, s, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x_bsh).view(b, s, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x_bsh).view(b, s, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, self.base), rotate(k, self.base)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.dim)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, s, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = Norm(config.hidden, config.norm_eps)
        self.input_layernorm_2 = Norm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = Norm(config.hidden, config.norm_eps)
        self.post_attention_layernorm_2 = Norm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x)))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class Body(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(config.hidden, config.norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden, 1)


@dataclass
class LoopOutput:
    logits_bsv: Tensor
    gate_logit_bs: Tensor
    hidden_bsh: Tensor


class ReferenceLoopLM(nn.Module):
    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens_bs: Tensor, loops: int | None = None) -> list[LoopOutput]:
        h = self.model.embed_tokens(tokens_bs)
        outputs = []
        for _ in range(loops or self.config.loops):
            for layer in self.model.layers:
                h = layer(h)
            h = self.model.norm(h)
            outputs.append(LoopOutput(self.lm_head(h), self.model.early_exit_gate(h).squeeze(-1), h))
        return outputs


def exit_probabilities(outputs: list[LoopOutput]) -> list[Tensor]:
    """p_1 .. p_T, each [b, s], by the definition."""
    survival = torch.ones_like(outputs[0].gate_logit_bs)
    probabilities = []
    for output in outputs[:-1]:
        gate = torch.sigmoid(output.gate_logit_bs)
        probabilities.append(gate * survival)
        survival = survival * (1 - gate)
    return [*probabilities, survival]


def token_ce(logits_bsv: Tensor, labels_bs: Tensor) -> Tensor:
    picked = logits_bsv.gather(-1, labels_bs[..., None]).squeeze(-1)
    return torch.logsumexp(logits_bsv, dim=-1) - picked


def token_loss(outputs: list[LoopOutput], labels_bs: Tensor, objective: ReferenceObjective) -> Tensor:
    """The objective of every token, [b, s]."""
    ces = [token_ce(output.logits_bsv, labels_bs) for output in outputs]
    loops = len(outputs)
    if objective.kind == "last_loop":
        return ces[-1]
    if objective.kind == "gate":
        total = torch.zeros_like(ces[0])
        for t in range(1, loops):
            improvement = torch.relu(ces[t - 1] - ces[t]).detach()
            target = torch.sigmoid(objective.slope * (improvement - objective.threshold))
            stop = torch.sigmoid(outputs[t].gate_logit_bs)
            total = total - (target * torch.log(1 - stop) + (1 - target) * torch.log(stop))
        return total / loops
    probabilities = exit_probabilities(outputs)
    prior = [objective.eta * (1 - objective.eta) ** t for t in range(loops)]
    total = torch.zeros_like(ces[0])
    for t in range(loops):
        p = probabilities[t]
        reference = 1.0 if objective.prior == "uniform" else prior[t] / sum(prior)
        total = total + p * ces[t] + objective.beta * p * (torch.log(p) - math.log(reference))
    return total


def reference_loss(
    model: ReferenceLoopLM,
    tokens_bs: Tensor,
    labels_bs: Tensor,
    mask_bs: Tensor,
    objective: ReferenceObjective,
    loops: int | None = None,
) -> Tensor:
    """Mean over counted tokens. The gate objective freezes everything else through the caller's requires_grad."""
    per_token = token_loss(model(tokens_bs, loops), labels_bs, objective)
    return (per_token * mask_bs).sum() / mask_bs.sum()


@dataclass
class ReferenceAdamW:
    """AdamW with global-norm clipping; weight decay on matrices only, as Megatron-Core's default."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    state: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    steps: int = 0

    @torch.no_grad()
    def step(self, model: nn.Module) -> float:
        """Updates the parameters that have gradients; returns the gradient norm before clipping."""
        named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for _, p in named if p.grad is not None))
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        self.steps += 1
        for name, p in named:
            assert p.grad is not None
            g = p.grad * scale
            m, v = self.state.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m = self.betas[0] * m + (1 - self.betas[0]) * g
            v = self.betas[1] * v + (1 - self.betas[1]) * g * g
            self.state[name] = (m, v)
            # The gate's weight is [1, hidden]: a matrix to this rule.
            decay = self.weight_decay if p.dim() > 1 else 0.0
            p.mul_(1 - self.lr * decay)
            m_hat, v_hat = m / (1 - self.betas[0] ** self.steps), v / (1 - self.betas[1] ** self.steps)
            p.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))
        return norm


@torch.no_grad()
def reference_generate(
    model: ReferenceLoopLM, prompt_s: list[int], new_tokens: int, loops: int, q: float | None = None
) -> tuple[list[int], list[int]]:
    """Greedy decoding by full recomputation. With q, each token leaves at the first t whose CDF reaches q.

    Returns (new tokens, 1-based exit loop of each). Every loop is always computed: early exit changes which loop's
    logits are read, never the states that later tokens attend to.
    """
    tokens, depths = list(prompt_s), []
    for _ in range(new_tokens):
        outputs = model(torch.tensor([tokens]), loops)
        depth = loops
        if q is not None:
            cumulative = 0.0
            for t, p in enumerate(exit_probabilities(outputs), start=1):
                cumulative += float(p[0, -1])
                if cumulative >= q:
                    depth = t
                    break
        depths.append(depth)
        tokens.append(int(outputs[depth - 1].logits_bsv[0, -1].argmax()))
    return tokens[len(prompt_s) :], depths
