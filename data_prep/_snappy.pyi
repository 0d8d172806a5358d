from typing_extensions import Buffer

def decode(
    source: Buffer, at: int, last: bool, window: Buffer, filled: int, literal: int, /
) -> tuple[int, int, int]: ...
