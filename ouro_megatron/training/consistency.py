"""Checks at run time that copies of weights are still copies. A wrong number here means every later number is wrong."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ouro_megatron.errors import TrainingError
from ouro_megatron.model.layout import Split, split_of
from ouro_megatron.recipe.schedule import is_due
from ouro_megatron.recipe.spans import Span
from ouro_megatron.training.engine import Engine

if TYPE_CHECKING:
    from ouro_megatron.training.trainer import StepOutcome, Trainer

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Consistency:
    """A callback: compares weights between ranks, and gradient buffers with parameters, now and then."""

    def __init__(self, every: Span | None) -> None:
        self._every = every

    def start(self, trainer: "Trainer") -> None:
        if self._every is not None:
            self._check(trainer)

    def after_step(self, trainer: "Trainer", outcome: "StepOutcome") -> None:
        if is_due(self._every, outcome.before, outcome.after):
            self._check(trainer)

    def finish(self, trainer: "Trainer") -> None:
        pass

    def _check(self, trainer: "Trainer") -> None:
        trainer.engine.position.phase = "comparing weights between ranks"
        check_weights(trainer.engine)
        check_gradient_buffers(trainer.engine)


def check_weights(engine: Engine) -> None:
    """All weights must be equal bit for bit over the data-parallel ranks; norms and gate over the tensor-parallel ones.

    All ranks call it together. Costs one pass over the weights and two small reductions a group.
    Raises TrainingError on every rank of a group that disagrees, naming the parameters.
    """
    if engine.overlap:
        engine.ddp.start_param_sync(force_sync=True)
    named = list(engine.lm.named_global_parameters())
    groups = engine.context.groups
    _compare(named, groups.dp_cp, "data-parallel", engine)
    _compare([(n, p) for n, p in named if split_of(n) is Split.WHOLE], groups.tp, "tensor-parallel", engine)


def fingerprint(parameter: Tensor) -> Tensor:
    """A scalar int64 that changes when a bit of the tensor does: its bits as integers, added up."""
    return parameter.detach().view(_BITS[parameter.element_size()]).sum(dtype=torch.int64)


def _compare(named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup, kind: str, engine: Engine) -> None:
    if group.size() == 1 or not named:
        return
    own = torch.stack([fingerprint(parameter) for _, parameter in named])
    low, high = own.clone(), own.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    differing = [name for (name, _), same in zip(named, (low == high).tolist(), strict=True) if not same]
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        raise TrainingError(
            f"the {kind} ranks {ranks} hold different copies of {shown} at {engine.position}. Memory or a link of one "
            "of them is faulty, or a gradient was not reduced: start again from the last checkpoint on other nodes"
        )


def check_gradient_buffers(engine: Engine) -> None:
    """All T uses of a weight must add to one gradient: each parameter's lies in the one DDP buffer, the views own none.

    Raises TrainingError naming the parameter.
    """
    owned = [parameter for view in engine.pipeline.views for parameter in view.parameters()]
    if owned:
        raise TrainingError(f"a loop's view of the layers owns {len(owned)} parameters: their gradients would be lost")
    buffers = {buffer.grad_data.untyped_storage().data_ptr() for buffer in engine.ddp.buffers}
    for name, parameter in engine.lm.named_global_parameters():
        if not parameter.requires_grad:
            continue
        gradient = getattr(parameter, "main_grad", None)
        if gradient is None or gradient.untyped_storage().data_ptr() not in buffers:
            raise TrainingError(f"the gradient of {name} does not lie in the buffer that is reduced")
