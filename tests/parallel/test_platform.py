"""What the CPU platform patches in Megatron-Core must still be there, and must not leak."""

import pytest
import torch

from ouro_megatron.errors import TrainingError
from ouro_megatron.parallel.platform import choose_platform
from tests.distributed.ranks import run_ranks


def patched_names() -> list[str]:
    """Names the platform replaces; raises when an upgrade has moved one."""
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core import optimizer, utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as base
    from megatron.core.pipeline_parallel import schedules

    for module, name in (
        (megatron_random, "_get_cuda_rng_state"),
        (megatron_random, "_set_cuda_rng_state"),
        (schedules, "torch"),
        (filesystem_async, "_results_queue"),
        (torch.cuda, "current_device"),
        (optimizer, "Adam"),
        (optimizer, "USING_PYTORCH_OPTIMIZER"),
        (distrib_optimizer, "Adam"),
        (distrib_optimizer, "HAVE_APEX_OR_TE"),
        (clip_grads, "l2_norm_impl"),
        *(
            (module, name)
            for module in (clip_grads, base)
            for name in ("multi_tensor_applier", "multi_tensor_scale_impl")
        ),
        (utils, "local_multi_tensor_applier"),
        (utils, "local_multi_tensor_l2_norm"),
        (utils, "local_multi_tensor_scale"),
    ):
        assert hasattr(module, name), f"{module.__name__}.{name} has moved"
    platform = choose_platform("cpu")
    with platform.megatron_calls():
        made = torch.zeros(2, device="cuda")
        name = torch.ones(1).type()
    outside = torch.ones(1).type()
    return [str(made.device), name, outside, str(schedules.torch.zeros(1, device="cuda").device)]


def test_cuda_names_mean_the_cpu_inside_megatron_calls_only() -> None:
    assert run_ranks(patched_names, 1)[0] == ["cpu", "torch.cuda.FloatTensor", "torch.FloatTensor", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_asking_for_cuda_without_one() -> None:
    with pytest.raises(TrainingError, match=r"training\.device=cpu"):
        choose_platform("cuda")
