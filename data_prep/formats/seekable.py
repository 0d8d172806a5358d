"""What raw files of this project's own have in common."""

import io
import os


class SeekableFile(io.RawIOBase):
    """A file of `size` bytes that is read from any place; its kinds add `readinto`, which moves `at` on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at
