"""Ouro, a looped language model (arXiv 2510.25741), for the transformers library. Needs torch and transformers only.

One stack of layers is run `config.total_ut_steps` times; the normed state of a loop is the input of the next, and head
and exit gate read it after every loop:

    h_0 = embed(tokens);  h_t = norm(layers(h_{t-1}));  logits_t = lm_head(h_t);  lambda_t = sigmoid(gate(h_t))

The key/value cache has an entry for each (loop, layer): index loop * num_hidden_layers + layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ouro import OuroConfig


@dataclass
class OuroModelOutput(BaseModelOutputWithPast):
    """`hidden_states`, when asked for: the normed state after each loop that ran, [b, s, h] each."""

    loop_states: tuple[Tensor, ...] | None = None
    """The same, always: what head and gate read."""


@dataclass
class OuroCausalLMOutput(CausalLMOutputWithPast):
    """What transformers' causal models return, and how each token left the loop."""

    exit_probabilities: Tensor | None = None
    """p_1 .. p_T, fp32 [b, kept positions, loops that ran]; sums to 1."""
    exit_loops: Tensor | None = None
    """0-based loop whose logits are returned, int64 [b, kept positions]; None for weighted logits."""


class OuroRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotary_angles(position_ids: Tensor, config: OuroConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [b, 1, s, head_dim] of rotate-half RoPE, computed in fp32. The same in every loop."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    angles = position_ids.float()[:, None, :, None] / config.rope_parameters["rope_theta"] ** half
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries or keys [b, heads, s, d] by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; returns [b, s, heads, d] and the weights. The mask is additive."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class OuroAttention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        cache_index: int,
        **kwargs: Any,
    ) -> Tensor:
        """x [b, s, h] -> [b, s, h]. `cache_index` is this (loop, layer)'s entry."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(x).view(shape).transpose(1, 2), *rotary)
        key = rotate(self.k_proj(x).view(shape).transpose(1, 2), *rotary)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, cache_index)
        name = self.config._attn_implementation
        attend: Callable[..., Any] = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.config.attention_dropout if self.training else 0.0
        context, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(context.reshape(*x.shape[:-1], -1))


class OuroMLP(nn.Module):
    """SwiGLU feed-forward without biases."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OuroDecoderLayer(GradientCheckpointingLayer):
    """Sandwich norm: each sub-layer has a norm before and after it, inside the residual branch."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = OuroAttention(config, layer_idx)
        self.mlp = OuroMLP(config)
        self.input_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        cache_index: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        attention = self.self_attn(self.input_layernorm(x), rotary, attention_mask, cache, cache_index, **kwargs)
        x = x + self.input_layernorm_2(attention)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroPreTrainedModel(PreTrainedModel):
    config_class = OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


def with_room_for(cache: Cache, entries: int) -> Cache:
    """Makes sure that `cache` has one layer for each (loop, layer); `generate` makes one a layer.

    Raises ValueError for caches that cannot grow, such as static ones.
    """
    if getattr(cache, "layer_class_to_replicate", None) is not None or len(cache.layers) >= entries:
        return cache
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"Ouro needs a cache of {entries} layers (loops x layers) and this {type(cache).__name__} has "
            f"{len(cache.layers)}: use a DynamicCache"
        )
    cache.layers.extend(DynamicLayer() for _ in range(entries - len(cache.layers)))
    return cache


class OuroModel(OuroPreTrainedModel):
    """Embedding, the looped layers, final norm and exit gate."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    def gate_logits(self, h: Tensor) -> Tensor:
        """[b, s, h] -> fp32 gate logits [b, s]."""
        gate = self.early_exit_gate
        return F.linear(h.float(), gate.weight.float(), gate.bias.float()).squeeze(-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        loops: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> OuroModelOutput:
        """`loops`: how many to run, config.total_ut_steps when left out; the same throughout for one cache.

        `cache` is what transformers calls `past_key_values` from 5.24 on; either name serves.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        loops = self.config.total_ut_steps if loops is None else loops
        layers = self.config.num_hidden_layers
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        seen = 0
        if cache is not None:
            cache, seen = with_room_for(cache, loops * layers), cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + h.shape[1], device=h.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        rotary = rotary_angles(position_ids, self.config, h.dtype)
        states: list[Tensor] = []
        for loop in range(loops):
            if cache is not None and cache.get_seq_length(loop * layers) != seen:
                raise ValueError(
                    f"the cache holds {seen} positions, but {cache.get_seq_length(loop * layers)} in loop {loop + 1}: "
                    "a sequence must be continued with the number of loops it was begun with"
                )
            for index, layer in enumerate(self.layers):
                h = layer(h, rotary, mask, cache, loop * layers + index, **kwargs)
            h = self.norm(h)
            states.append(h)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return OuroModelOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=tuple(states) if wanted else None,
            loop_states=tuple(states),
        )


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """p_1 .. p_T over the last dimension from gate logits [..., T], in log space: p_t = lambda_t * prod_{j<t}(1 -
    lambda_j), and the last loop takes what is left."""
    log_survival = F.logsigmoid(-gate_logits).cumsum(-1)
    before = torch.cat((torch.zeros_like(log_survival[..., :1]), log_survival[..., :-1]), dim=-1)
    log_p = F.logsigmoid(gate_logits) + before
    return torch.cat((log_p[..., :-1], before[..., -1:]), dim=-1).exp()


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    """Ouro with its language-model head."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> OuroCausalLMOutput | tuple[Any, ...]:
        """Logits of the loop each token leaves at.

        exit_at_step: 0-based loop to leave at; the loops after it are not run. Wins over the threshold.
        exit_threshold: q in 0..1; each token leaves at the first loop where the CDF of its exit distribution reaches
        it, at 1 after the last. All loops run, so that the cache is the same for every q.
        use_weighted_exit: the mean of all loops' logits, weighted by the exit distribution.
        labels: adds the cross-entropy of the returned logits, shifted by one.
        All three can be given to `generate` too.
        """
        loops = self.config.total_ut_steps
        step = self.config.early_exit_step if exit_at_step is None else exit_at_step
        q = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        if step is not None and not 0 <= step < loops:
            raise ValueError(f"exit_at_step {step}: from 0 to {loops - 1} (total_ut_steps - 1)")
        if q is not None and not 0.0 <= q <= 1.0:
            raise ValueError(f"exit_threshold {q}: from 0 to 1")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            loops=loops if step is None else step + 1,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = torch.stack([state[:, kept] for state in outputs.loop_states], dim=2)  # [b, kept, loops, h]
        p = exit_distribution(self.model.gate_logits(states))
        exit_loops: Tensor | None = None
        if use_weighted_exit and step is None:
            weighted = [self.lm_head(states[:, :, t]) * p[:, :, t, None] for t in range(states.shape[2])]
            logits = torch.stack(weighted).sum(0).to(states.dtype)
        else:
            exit_loops = self._exit_loops(p, step, q)
            index = exit_loops[:, :, None, None].expand(-1, -1, 1, states.shape[-1])
            logits = self.lm_head(states.gather(2, index).squeeze(2))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = OuroCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            exit_probabilities=p,
            exit_loops=exit_loops,
        )
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _exit_loops(p: Tensor, step: int | None, q: float | None) -> Tensor:
        last = p.shape[-1] - 1
        if step is not None or q is None or q >= 1.0:
            return torch.full(p.shape[:-1], last, dtype=torch.int64, device=p.device)
        reached = p.cumsum(-1) >= q
        reached[..., last] = True
        return reached.int().argmax(-1)


__all__ = ["OuroForCausalLM", "OuroModel", "OuroPreTrainedModel"]
