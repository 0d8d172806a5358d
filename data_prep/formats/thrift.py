"""Thrift's compact protocol as far as parquet's page headers need it: a struct as a mapping of field numbers.

Format: github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

from typing import Any, BinaryIO

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_DEEPEST = 8


def read_struct(stream: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """The fields of the struct that begins where the stream stands, and the stream behind it.

    Integers, booleans and structs are read; the places of strings, lists, maps and doubles hold None. Raises ValueError
    when this is no struct.
    """
    if depth > _DEEPEST:
        raise ValueError("no page header: it goes too deep")
    fields: dict[int, Any] = {}
    number = 0
    while (head := _byte(stream)) & 15 != _STOP:
        number = number + (head >> 4) if head >> 4 else _zigzag(stream)
        fields[number] = _value(stream, head & 15, depth)
    return fields


def _value(stream: BinaryIO, kind: int, depth: int) -> Any:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE
    if kind in (_I16, _I32, _I64):
        return _zigzag(stream)
    if kind == _STRUCT:
        return read_struct(stream, depth + 1)
    if kind in (_BYTE, _DOUBLE):
        stream.seek(1 if kind == _BYTE else 8, 1)
    elif kind == _BINARY:
        stream.seek(_varint(stream), 1)
    elif kind in (_LIST, _SET):
        head = _byte(stream)
        _skip(stream, head >> 4 if head >> 4 != 15 else _varint(stream), (head & 15,), depth)
    elif kind == _MAP:
        if size := _varint(stream):
            kinds = _byte(stream)
            _skip(stream, size, (kinds >> 4, kinds & 15), depth)
    else:
        raise ValueError(f"no page header: a field of kind {kind}")
    return None


def _skip(stream: BinaryIO, count: int, kinds: tuple[int, ...], depth: int) -> None:
    """Elements of a list or a map, where a boolean is a byte of its own."""
    for _ in range(count):
        for kind in kinds:
            _value(stream, _BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)


def _byte(stream: BinaryIO) -> int:
    read = stream.read(1)
    if not read:
        raise ValueError("no page header: the file ends within it")
    return read[0]


def _varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("no page header: a number of more than 64 bits")


def _zigzag(stream: BinaryIO) -> int:
    value = _varint(stream)
    return value >> 1 ^ -(value & 1)
