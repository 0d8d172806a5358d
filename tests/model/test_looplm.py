"""The model in one process against the reference: any number of loops, grouped heads, initialisation."""

import numpy as np
import torch

from ouro_megatron.model.layout import join_shards, take_shard
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import create_context
from ouro_megatron.planning.flops import parameter_counts
from ouro_megatron.recipe.schema import ModelSection, ParallelSection
from tests.distributed.parity import fill_reference, load
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM
from tests.reference.mapping import reference_config, to_megatron


def section(**changes: object) -> ModelSection:
    values = {"layers": 3, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 64, "loops": 4, **changes}
    return ModelSection.model_validate(values)


def forward_difference(model: ModelSection, loops: int) -> float:
    context = create_context(ParallelSection())
    config = reference_config(model)
    reference = ReferenceLoopLM(config)
    fill_reference(reference)
    lm = LoopLM(model, context)
    load(lm, to_megatron(dict(reference.state_dict()), config))
    tokens_bs = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    worst = 0.0
    with torch.no_grad():
        h_sbh = lm.embed(tokens_bs)
        rotary = lm.rotary(torch.arange(12))
        for output in reference(tokens_bs, loops):
            h_sbh = lm.run_layers(h_sbh, rotary)
            logits_bsv = lm.full_logits(h_sbh).transpose(0, 1)
            worst = max(worst, float((logits_bsv - output.logits_bsv).abs().max()))
    context.close()
    return worst


def test_logits_of_every_loop() -> None:
    assert run_ranks(forward_difference, 1, section(), 4)[0] < 1e-4


def test_more_loops_than_trained() -> None:
    assert run_ranks(forward_difference, 1, section(), 9)[0] < 1e-4


def test_grouped_heads_head_dim_and_rope_base() -> None:
    model = section(kv_heads=2, head_dim=16, rope_base=1e6)
    assert run_ranks(forward_difference, 1, model, 2)[0] < 1e-4


def initial_weights(tensor: int, pipeline: int) -> dict[str, np.ndarray]:
    """This rank's freshly drawn shards by global name."""
    context = create_context(ParallelSection(tensor=tensor, pipeline=pipeline))
    lm = LoopLM(section(layers=4, post_norm_init=0.25), context)
    initialise(lm, seed=7)
    shards = {name: parameter.detach().numpy().copy() for name, parameter in lm.named_global_parameters()}
    context.close()
    return shards


def drawn(tensor: int, pipeline: int) -> list[dict[str, torch.Tensor]]:
    ranks = run_ranks(initial_weights, tensor * pipeline, tensor, pipeline)
    return [{name: torch.from_numpy(array) for name, array in shards.items()} for shards in ranks]


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    (whole,) = drawn(1, 1)
    ranks = drawn(2, 2)
    names: set[str] = set()
    for first, second in ((ranks[0], ranks[1]), (ranks[2], ranks[3])):  # the two tensor ranks of each stage
        for name in first:
            names.add(name)
            assert torch.equal(join_shards(name, [first[name], second[name]]), whole[name]), name
            assert torch.equal(take_shard(name, whole[name], 1, 2), second[name])
    assert names == set(whole)
    assert whole["exit_gate.weight"].abs().max() == 0
    assert set(whole["decoder.layers.0.post_mlp_norm.weight"].tolist()) == {0.25}
    assert 0.015 < float(whole["embedding.word_embeddings.weight"].std()) < 0.025


def test_parameter_count_is_the_models() -> None:
    (whole,) = drawn(1, 1)
    assert sum(tensor.numel() for tensor in whole.values()) == parameter_counts(section(layers=4)).total
