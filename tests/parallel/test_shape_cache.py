"""Remembered shapes are those that the operators themselves give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ouro_megatron.parallel import collective_log
from ouro_megatron.parallel.shape_cache import ShapeCache
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.training.dry_run import Rehearsal, rehearsal_pool, rehearse_rank
from tests.tiny import tiny_recipe


class Remembering(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.run = ShapeCache()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CASES: dict[str, Callable[[], Any]] = {
    "product": lambda: meta(3, 4) @ meta(4, 5),
    "broadcast": lambda: meta(3, 1, 4) + meta(5, 4),
    "other strides": lambda: meta(3, 4).t() * 2.0,
    "whole times whole": lambda: meta(3, dtype=torch.int64) * 2,
    "whole times real": lambda: meta(3, dtype=torch.int64) * 2.0,
    "whole times truth": lambda: meta(3, dtype=torch.int64) * True,
    "truth times whole": lambda: meta(3, dtype=torch.bool) * 2,
    "truth times truth": lambda: meta(3, dtype=torch.bool) * True,
    "two types": lambda: meta(3, dtype=torch.bfloat16) + meta(3),
    "cast": lambda: meta(3).to(torch.bfloat16),
    "reduction": lambda: meta(3, 4).sum(dim=-1, keepdim=True),
    "two results": lambda: meta(3, 4).max(dim=1).values + meta(3, 4).max(dim=1).indices,
    "list of tensors": lambda: torch.cat([meta(2, 3), meta(4, 3)]),
    "in place": lambda: meta(3, 4).add_(meta(4)).mul_(2),
    "copy to another type": lambda: meta(3, dtype=torch.bfloat16).copy_(meta(3)),
    "view": lambda: meta(3, 4).view(4, 3).transpose(0, 1)[1:],
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_strides_and_types(name: str) -> None:
    expected = form(CASES[name]())
    with Remembering():
        for other in CASES.values():  # whatever was asked before must not matter
            other()
        assert form(CASES[name]()) == expected


def test_what_is_remembered_is_a_new_tensor_and_what_is_written_the_same() -> None:
    with Remembering():
        left, right = meta(3), meta(3)
        first, second = left + right, left + right
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        assert left.add_(right) is left and left.add_(right) is left
        assert left.view(3, 1).untyped_storage()._cdata == left.untyped_storage()._cdata


def test_tensors_that_hold_data_are_computed() -> None:
    with Remembering():
        assert [float(torch.full((2,), value).sum()) for value in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]


def test_gradients_flow() -> None:
    with Remembering():
        for _ in range(2):
            weight = meta(4, 5).requires_grad_()
            (meta(3, 4) @ weight).relu().sum().backward()
            assert weight.grad is not None and form(weight.grad) == form(weight)


def rehearse_without_memory(recipe_text: str) -> Rehearsal:
    plain: Any = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731
    collective_log.ShapeCache = lambda: plain  # type: ignore[misc, assignment]
    return rehearse_rank(recipe_text, 8, 4, "pipeline 1")


def test_a_dry_run_makes_the_same_calls_without(tmp_path: Any) -> None:
    recipe = tiny_recipe(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        batch={"global_tokens": 256},
        training={"recompute": "full"},
    )
    text = dump_recipe(recipe)
    with rehearsal_pool(1) as pool:
        remembered = pool.submit(rehearse_rank, text, 8, 4, "pipeline 1").result()
        plain = pool.submit(rehearse_without_memory, text).result()
    assert remembered.calls == plain.calls and len(plain.calls) > 50
    assert remembered.parameters == plain.parameters
