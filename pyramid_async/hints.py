"""What the processes of a pool tell each other, through memory that they share."""

from __future__ import annotations

import json
import mmap
from typing import Any
from zlib import crc32


class Hints:
    """A small dictionary that a process and those that it forks have in common.

    Whoever reads while another one writes finds nothing, and of two that write one may win: it
    is for what does no harm when it is lost.  As JSON has it, tuples come back as lists.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        self._bytes = mmap.mmap(-1, size)

    def read(self) -> dict[str, Any]:
        checksum, _, data = bytes(self._bytes).rstrip(b"\0").partition(b" ")
        return json.loads(data) if checksum == checksum_of(data) else {}

    def write(self, hints: dict[str, Any]) -> None:
        data = json.dumps(hints).encode()
        whole = checksum_of(data) + b" " + data
        if len(whole) <= len(self._bytes):
            self._bytes[:] = whole.ljust(len(self._bytes), b"\0")


def checksum_of(data: bytes) -> bytes:
    return b"%08x" % crc32(data)
