"""Errors that rounding to 8 bits makes in a trained looped model, loop by loop. Part of fp8_numerics.py."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.recipe.schema import Fp8Section

Row = dict[str, list[float]]


def error_growth(run: Path, ways: dict[str, dict[str, Any]], tokens: Tensor, loops: int) -> dict[str, Row]:
    """By way, a list over loops 1 to `loops` of each measure, against the same weights in fp32.

    `state`: relative error of h_t when all visits round; `visit`: of one visit that starts from the exact state;
    `logits`: relative error after the head; `kl`: nats between the two next-token distributions;
    `gradient`: relative error of the gradient of all matrices of the layers at that many loops; `cosine`: its angle.
    """
    loaded = load_for_inference(run)
    exact = loaded.lm.train()
    weights = exact.state_dict()
    recipe = loaded.recipe
    models = {"bf16": LoopLM(recipe.model, loaded.context, dtype=torch.bfloat16)}
    for name, settings in ways.items():
        models[name] = LoopLM(recipe.model, loaded.context, fp8=Fp8Section(emulate=True, **settings))
    for model in models.values():
        model.load_state_dict(weights)
        model.weights_changed()
    states = [h.detach() for h in visit_all(exact, tokens, loops)]
    gradients = [gradient_at(exact, tokens, count) for count in range(1, loops + 1)]
    return {name: compare(model.train(), exact, tokens, states, gradients) for name, model in models.items()}


def visit_all(lm: LoopLM, tokens: Tensor, loops: int) -> list[Tensor]:
    """h_0 .. h_loops, each [s, b, h]."""
    rotary = lm.rotary_of(tokens.shape[1] - 1, None)
    states = [lm.embed(tokens[:, :-1])]
    for loop in range(loops):
        states.append(lm.run_layers(states[-1], rotary, loop=loop))
    return states


def gradient_at(lm: LoopLM, tokens: Tensor, loops: int) -> Tensor:
    """Of the last loop's mean cross-entropy: all matrices of the layers in one vector, fp32."""
    lm.zero_grad(set_to_none=True)
    logits_sbv = lm.full_logits(visit_all(lm, tokens, loops)[-1])
    F.cross_entropy(logits_sbv.float().flatten(0, 1), tokens[:, 1:].t().flatten()).backward()
    parts = [p.grad.float().flatten() for name, p in lm.decoder.layers.named_parameters() if p.dim() > 1]
    return torch.cat(parts)


def compare(lm: LoopLM, exact: LoopLM, tokens: Tensor, states: list[Tensor], gradients: list[Tensor]) -> Row:
    loops = len(gradients)
    for _ in range(3):  # delayed scaling needs maxima of earlier visits, forward and backward
        gradient_at(lm, tokens, loops)
    rotary = lm.rotary_of(tokens.shape[1] - 1, None)
    row: Row = {key: [] for key in ("state", "visit", "logits", "kl", "gradient", "cosine")}
    with torch.no_grad():
        rounded = visit_all(lm, tokens, loops)
        for t in range(1, loops + 1):
            once = lm.run_layers(states[t - 1].to(lm.dtype), rotary, loop=t - 1)
            mine, target = exact.full_logits(rounded[t].float()), exact.full_logits(states[t])
            row["state"].append(relative(rounded[t], states[t]))
            row["visit"].append(relative(once, states[t]))
            row["logits"].append(relative(mine, target))
            row["kl"].append(divergence(mine, target))
    for count, target in enumerate(gradients, start=1):
        mine = gradient_at(lm, tokens, count)
        row["gradient"].append(relative(mine, target))
        row["cosine"].append(float(F.cosine_similarity(mine, target, dim=0)))
    return row


def divergence(mine_sbv: Tensor, target_sbv: Tensor) -> float:
    """Mean over tokens of KL(target || mine), nats."""
    each = F.kl_div(mine_sbv.log_softmax(-1), target_sbv.log_softmax(-1), log_target=True, reduction="none")
    return float(each.sum(-1).mean())


def relative(mine: Tensor, target: Tensor) -> float:
    return float((mine.float() - target).norm() / target.norm())
