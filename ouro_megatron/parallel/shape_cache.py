"""Results of operations on the meta device, remembered by the shapes that went in.

Most operators compute their output's shape in Python, which takes some 100 microseconds, and a step on shapes asks the
same few dozen questions again in every layer, loop and microbatch.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

Operator = Any
"""torch._ops.OpOverload, whose type is not public."""


class ShapeCache:
    """Runs operators; those that were asked before with arguments of the same form are answered from memory.

    Remembered are operators that make new tensors (shape, strides and type are kept) and those that write into their
    first argument alone and return it. Views and whatever else shares memory run as they are, as does every call with a
    tensor that holds data.
    """

    def __init__(self) -> None:
        self._kinds: dict[Operator, str] = {}
        self._made: dict[Hashable, Callable[[], Any]] = {}
        self._written: set[Hashable] = set()

    def __call__(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self._kinds.get(operator)
        if kind is None:
            kind = self._kinds[operator] = _kind_of(operator)
        if kind == "other":
            return operator(*args, **kwargs)
        key = (operator, _form(args), _form(tuple(kwargs.items())))
        if None in key:
            return operator(*args, **kwargs)
        if kind == "writes":
            if key not in self._written:
                operator(*args, **kwargs)
                self._written.add(key)
            return args[0]
        make = self._made.get(key)
        if make is not None:
            return make()
        result = operator(*args, **kwargs)
        make = _maker(result)
        if make is not None:
            self._made[key] = make
        return result


def _kind_of(operator: Operator) -> str:
    schema = operator._schema
    aliases = [argument.alias_info for argument in schema.arguments]
    if not any(alias is not None for alias in (*aliases, *(one.alias_info for one in schema.returns))):
        return "makes"
    first = aliases[0]
    writes_first_only = first is not None and first.is_write and all(alias is None for alias in aliases[1:])
    if writes_first_only and len(schema.returns) == 1 and "resize" not in schema.name and "set_" not in schema.name:
        return "writes"
    return "other"


def _form(value: Any) -> Hashable:
    """What decides about an output's shape; None where that cannot be said."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, (tuple, list)):
        forms = tuple(map(_form, value))
        return None if None in forms else forms
    # The type too: 2, 2.0 and True are equal, but a tensor multiplied by them has different types.
    return (type(value), value)


def _maker(result: Any) -> Callable[[], Any] | None:
    """Makes tensors like those of `result` anew."""
    if isinstance(result, Tensor):
        if not result.is_meta:
            return None
        shape, strides, dtype = result.shape, result.stride(), result.dtype
        return lambda: torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if isinstance(result, (tuple, list)):
        made = [_maker(one) for one in result]
        kind = type(result)
        return None if any(one is None for one in made) else lambda: kind(one() for one in made if one is not None)
    if result is None or isinstance(result, (int, float, bool)):
        return lambda: result
    return None
