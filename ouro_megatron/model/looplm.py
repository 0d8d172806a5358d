"""LoopLM: one pipeline rank's part of a looped language model, on Megatron-Core's layers. Knows nothing of training.

    h_0 = embed(tokens);  h_t = final_norm(layers(h_{t-1}));  logits_t = head(h_t);  lambda_t = sigmoid(gate(h_t))

The layers exist once; `loops` is whatever the caller asks for. The normed state feeds the next loop (published
checkpoints of arXiv 2510.25741).
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from ouro_megatron.model.attention import rotary_embedding
from ouro_megatron.model.config import head_dim, transformer_config
from ouro_megatron.model.context_attention import ContextPart
from ouro_megatron.model.documents import DocumentBounds
from ouro_megatron.model.fp8.emulation import AmaxHistory, Fp8Emulation, amax_histories
from ouro_megatron.model.graphs import GraphedVisits
from ouro_megatron.model.layer import FUSED_NORMS, block_spec
from ouro_megatron.model.layout import Split, split_of, take_shard, whole_shape
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.layers import balanced_layers, fp8_layers
from ouro_megatron.recipe.schema import Fp8Section, ModelSection, ParallelSection, Recompute


class ExitGate(nn.Module):
    """Linear(hidden, 1) with bias, one for all loops. Logits are fp32 or wider: they feed log-space survival."""

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
        for parameter in (self.weight, self.bias):
            # Each tensor-parallel rank sees its own tokens then, so Megatron must add the gradients up.
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, h_sbh: Tensor) -> Tensor:
        """[s, b, h] -> gate logits [s, b]."""
        wide = torch.promote_types(h_sbh.dtype, torch.float32)
        return F.linear(h_sbh.to(wide), self.weight.to(wide), self.bias.to(wide)).squeeze(-1)


class LoopLM(MegatronModule):
    """Embedding on the first pipeline rank, final norm, gate and head on the last, layers on each.

    `layers_by_rank` says how many layers each pipeline rank holds; balanced by FLOPs when absent. Checkpoints do not
    depend on it. With `fp8` the layers that it names make their matrix products in 8 bits.
    """

    def __init__(
        self,
        model: ModelSection,
        context: ParallelContext,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        recompute_loops: int | None = None,
        layers_by_rank: Sequence[int] | None = None,
        fp8: Fp8Section | None = None,
    ) -> None:
        parallel = ParallelSection(
            tensor=context.tensor_size,
            pipeline=context.pipeline_size,
            context=context.context_size,
            sequence=context.sequence_parallel,
        )
        self._layers_by_rank = list(layers_by_rank or balanced_layers(model, context.pipeline_size))
        config = transformer_config(
            model,
            parallel,
            dtype=dtype,
            device=context.device,
            layers_by_rank=self._layers_by_rank,
            fp8=fp8,
        )
        super().__init__(config=config)
        self.model = model
        self.context = context
        self.dtype = dtype
        self._recompute = recompute
        self._recompute_loops = recompute_loops
        groups = context.groups
        # Megatron's gradient reduction asks which end of the pipeline this is and whether the head is tied.
        self.pre_process, self.post_process = context.is_first_stage, context.is_last_stage
        self.share_embeddings_and_output_weights = False
        self.embedding: LanguageModelEmbedding | None = None
        if context.is_first_stage:
            self.embedding = LanguageModelEmbedding(
                config, model.vocab, max_sequence_length=0, position_embedding_type="rope", tp_group=groups.tp
            )
        self.fp8_emulation = Fp8Emulation(fp8, groups.tp_dp_cp) if fp8 is not None and fp8.emulate else None
        """Shared by the linears that round to 8 bits; None when there are none."""
        here = self._layers_by_rank[context.pipeline_rank]
        first = sum(self._layers_by_rank[: context.pipeline_rank])
        in_fp8 = fp8_layers(model, fp8)
        self.decoder = TransformerBlock(
            config,
            block_spec(model, here, self.fp8_emulation, [index for index in range(here) if first + index in in_fp8]),
            pre_process=True,
            post_process=context.is_last_stage,
            pg_collection=groups,
        )
        self.output_layer: ColumnParallelLinear | None = None
        self.exit_gate: ExitGate | None = None
        if context.is_last_stage:
            self.exit_gate = ExitGate(model.hidden, dtype, context.device, context.sequence_parallel)
            # The loss head makes this weight's gradient itself; Megatron would ask for apex's kernel here even where
            # Transformer Engine's linears fuse their own.
            head_config = copy.copy(config)
            head_config.gradient_accumulation_fusion = False
            self.output_layer = ColumnParallelLinear(
                model.hidden,
                model.vocab,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                tp_group=groups.tp,
            )
        self.graphs: GraphedVisits | None = None
        """Recorded visits that training uses in place of the layers' own code; see `record_graphs`."""
        self._mark_tensor_parallel()
        self.weights_changed()

    def _mark_tensor_parallel(self) -> None:
        """Says which parameters are cut over ranks. Megatron does so while initialising, which is skipped here;
        without it the gradient norm would count shards as copies."""
        for name, parameter in self.named_global_parameters():
            split = split_of(name)
            if split is not Split.WHOLE and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(
                    parameter, True, dim=1 if split is Split.COLUMNS else 0, stride=2 if split is Split.ROW_PAIRS else 1
                )

    def embed(self, tokens_bs: Tensor) -> Tensor:
        """tokens int64 [b, s] -> h_0 [s, b, h] (s / tensor_parallel under sequence parallelism). First rank only."""
        assert self.embedding is not None, "embed is the first pipeline rank's"
        return self.embedding(tokens_bs, None)

    def rotary(self, positions_s: Tensor) -> Tensor:
        """RoPE angles for positions [s] or [s, b], the same in every loop; see `rotary_embedding`."""
        return rotary_embedding(positions_s, head_dim(self.model), self.model.rope_base)

    def rotary_of(self, length: int, documents: DocumentBounds | ContextPart | None) -> Tensor:
        """RoPE angles of this rank's tokens of sequences of `length`, which begin anew with each of `documents`."""
        if documents is not None:
            return self.rotary(documents.positions_sb)
        return self.rotary(self.context.own_positions(length).to(self.context.device))

    def run_layers(
        self, h_sbh: Tensor, rotary: Tensor, loop: int = 0, documents: DocumentBounds | ContextPart | None = None
    ) -> Tensor:
        """One visit of this rank's layers: [s, b, h] -> [s, b, h], with the final norm on the last pipeline rank.

        `loop` counts from 0; with `recompute_loops` = k loops k and later keep their activations. With `documents`
        each attends to itself only; `rotary` must be of their positions. Under context parallelism s counts this rank's
        tokens, and the local attention core needs their ContextPart.
        """
        if self.graphs is not None and self.training and torch.is_grad_enabled():
            return self.graphs(h_sbh, loop)
        self._choose_recomputation(loop)
        return self.decoder(
            hidden_states=h_sbh, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=documents
        )

    def record_graphs(self, rows: int, length: int, loops: int) -> None:
        """Training visits of plain rows [rows, length] replay CUDA graphs from here on; anew after other ones.

        On CUDA, where this rank has all layers and whole sequences, after one step without graphs, which has made every
        kernel. Gradient buffers (`main_grad`) hold rubbish afterwards.
        """
        self.graphs = None
        rotary = self.rotary_of(length, None)
        example_sbh = torch.zeros(length, rows, self.model.hidden, dtype=self.dtype, device=self.context.device)
        self.graphs = GraphedVisits(
            lambda h_sbh, loop: self.run_layers(h_sbh, rotary, loop), self.decoder, example_sbh, loops
        )

    @torch.no_grad()
    def weights_changed(self) -> None:
        """To be called after each update and each load: copies of weights in another format are made anew."""
        if self.fp8_emulation is not None:
            self.fp8_emulation.weights_changed()
        for module in self.modules():
            if not hasattr(module, "is_first_microbatch"):
                continue
            # One of Transformer Engine's linears. Without a copy it makes one in its next visit and keeps it for all
            # that follow. Its own word for that, a first microbatch, would also make that visit's gradient replace what
            # other loops have added to the buffer by then.
            module.is_first_microbatch = False
            if self.graphs is None:
                module._fp8_workspaces.clear()
            for copied in module._fp8_workspaces.values():
                # Graphs read it where it is.
                copied.quantize_(module.weight)

    def _choose_recomputation(self, loop: int) -> None:
        mode = self._recompute
        if self._recompute_loops is not None and loop >= self._recompute_loops:
            mode = "none"
        self.decoder.config.recompute_granularity = "full" if mode == "full" else None
        for layer in self.decoder.layers:
            layer.recompute_cheap = mode == "selective"

    def gate_logits(self, h_sbh: Tensor) -> Tensor:
        """Gate logits [s, b], fp32 or wider, of all tokens on every tensor-parallel rank. Last pipeline rank only."""
        assert self.exit_gate is not None, "the gate is the last pipeline rank's"
        logits = self.exit_gate(h_sbh)
        if self.context.sequence_parallel:
            # Every rank computes the same from the gathered logits, so the backward is a split, not a sum.
            logits = gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=False, group=self.context.groups.tp
            )
        return logits

    def full_logits(self, h_sbh: Tensor) -> Tensor:
        """Logits [s, b, vocab] on every tensor-parallel rank: for generation. Last pipeline rank only."""
        assert self.output_layer is not None, "the head is the last pipeline rank's"
        logits, _ = self.output_layer(h_sbh)
        return gather_from_tensor_model_parallel_region(logits, group=self.context.groups.tp)

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under layout-independent names: layers are numbered over the whole pipeline."""
        for name, parameter in self.named_parameters():
            yield self._global_name(name), parameter

    def named_amax_histories(self) -> Iterator[tuple[str, AmaxHistory]]:
        """Histories of delayed FP8 scaling under layout-independent names; none for other recipes."""
        for name, history in amax_histories(self):
            yield self._global_name(name), history

    def _global_name(self, name: str) -> str:
        if not name.startswith("decoder.layers."):
            return name
        _, _, index, rest = name.split(".", 3)
        for fused, plain in FUSED_NORMS.items():
            rest = rest.replace(fused, plain)
        return f"decoder.layers.{int(index) + sum(self._layers_by_rank[: self.context.pipeline_rank])}.{rest}"

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Layers are stored one by one, so that a deeper model can be made by copying names."""
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True})


@torch.no_grad()
def initialise(lm: LoopLM, seed: int) -> None:
    """Draws all weights: matrices N(0, init_std), norms 1, but those after a sub-layer `post_norm_init`, the gate's
    weight 0 and its bias `gate_bias_init` (so lambda_t is sigmoid of it at the start).

    Each tensor's draw depends on the seed and its global name alone, so every parallel layout starts from the same
    weights.
    """
    for name, parameter in lm.named_global_parameters():
        if name == "exit_gate.weight":
            parameter.zero_()
        elif name == "exit_gate.bias":
            parameter.fill_(lm.model.gate_bias_init)
        elif ".post_attention_norm." in name or ".post_mlp_norm." in name:
            parameter.fill_(lm.model.post_norm_init)
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            size = lm.context.tensor_size
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            whole = torch.empty(whole_shape(name, parameter, size)).normal_(0.0, lm.model.init_std, generator=generator)
            parameter.copy_(take_shard(name, whole, lm.context.tensor_rank, size))
    lm.weights_changed()
