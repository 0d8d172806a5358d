"""Amounts of training written the way people say them: "3T", "512k", "8Mi", "100 steps"."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_FACTORS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_AMOUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")
_STEPS = re.compile(r"^(.*?)\s*steps?\s*$", re.IGNORECASE)
_TOKENS = re.compile(r"^(.*?)\s*tokens?\s*$", re.IGNORECASE)


def parse_amount(value: object) -> int:
    """Whole number from 12, "12", "1_000", "512k" (10^3), "8Mi" (2^20), "1.4T" (10^12).

    Raises ValueError for anything else, negative and fractional results included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected an amount such as 4096, '512k', '8Mi' or '3T', got {value!r}")
    if isinstance(value, int | float):
        if value < 0 or value != int(value):
            raise ValueError(f"expected a whole number that is not negative, got {value!r}")
        return int(value)
    match = _AMOUNT.match(value)
    if match is None or match.group(2).lower() not in _FACTORS:
        raise ValueError(
            f"expected an amount such as 4096, '512k' (thousand), '8Mi' (2^20), '20B' or '3T', got {value!r}"
        )
    number, factor = match.group(1).replace("_", ""), _FACTORS[match.group(2).lower()]
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) * factor
    divisor = 10 ** len(fraction)
    if scaled % divisor:
        raise ValueError(f"{value!r} is not a whole number")
    return scaled // divisor


def format_amount(value: int) -> str:
    """Shortest exact spelling: 3_000_000_000_000 -> "3T", 8_388_608 -> "8Mi", 4097 -> "4097"."""
    for suffix, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value and value % factor == 0:
            return f"{value // factor}{suffix}"
    for suffix, factor in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value and value % factor == 0:
            return f"{value // factor}{suffix}"
    return str(value)


Amount = Annotated[int, BeforeValidator(parse_amount)]


@dataclass(frozen=True)
class Span:
    """A length of training: `tokens` or `steps`, exactly one of them set."""

    tokens: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("a span counts either tokens or steps")

    @classmethod
    def parse(cls, value: object) -> "Span":
        """Accepts "20B", "20B tokens", 4096 (tokens) and "100 steps". Raises ValueError otherwise."""
        if isinstance(value, Span):
            return value
        if isinstance(value, str):
            if match := _STEPS.match(value):
                return cls(steps=parse_amount(match.group(1)))
            if match := _TOKENS.match(value):
                return cls(tokens=parse_amount(match.group(1)))
        return cls(tokens=parse_amount(value))

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        assert self.tokens is not None
        return f"{format_amount(self.tokens)} tokens"

    @property
    def is_zero(self) -> bool:
        return not (self.tokens or self.steps)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )
