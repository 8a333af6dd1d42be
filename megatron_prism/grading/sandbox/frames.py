"""Messages between a grader and the processes that it starts: JSON and bytes over a pipe. Standard library alone, see `confine`."""

import json
import os
import selectors
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

Message = dict[str, Any]
CHUNK_BYTES = 1 << 20


class EndedError(Exception):
    """The other side is gone, or said nothing in time (then `late`)."""

    def __init__(self, late: bool = False) -> None:
        super().__init__("no answer in time" if late else "ended")
        self.late = late


def descriptors(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """Where a process that was started with pipes reads frames and where it writes them."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin.fileno(), process.stdout.fileno()


def readable(waiting: Iterable[int], seconds: float) -> list[int]:
    """Which of the descriptors can be read, or have ended; after `seconds` none. Unlike select(2) it takes those beyond 1,023 too."""
    with selectors.DefaultSelector() as selector:
        for descriptor in waiting:
            selector.register(descriptor, selectors.EVENT_READ)
        return [key.fd for key, _ in selector.select(max(0.0, seconds))]


def hang_up(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipes to a process, whatever waits in them."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def write_frame(descriptor: int, message: Message, payload: bytes = b"") -> None:
    """Two lengths of 8 bytes each, the message, the bytes."""
    head = json.dumps(message).encode()
    write_all(descriptor, len(head).to_bytes(8, "big") + len(payload).to_bytes(8, "big") + head + payload)


def write_all(descriptor: int, data: bytes) -> None:
    """All of it, however often that takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_frame(descriptor: int, seconds: float | None = None) -> tuple[Message, bytes]:
    """The next message and its bytes. Errors: EndedError."""
    deadline = None if seconds is None else time.monotonic() + seconds
    lengths = _read_exactly(descriptor, 16, deadline)
    head = _read_exactly(descriptor, int.from_bytes(lengths[:8], "big"), deadline)
    return json.loads(head), _read_exactly(descriptor, int.from_bytes(lengths[8:], "big"), deadline)


def _read_exactly(descriptor: int, num_bytes: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < num_bytes:
        if deadline is not None and not readable([descriptor], deadline - time.monotonic()):
            raise EndedError(late=True)
        part = os.read(descriptor, min(num_bytes - len(parts), CHUNK_BYTES))
        if not part:
            raise EndedError()
        parts += part
    return bytes(parts)
