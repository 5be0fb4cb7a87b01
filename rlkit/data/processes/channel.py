"""Frames of JSON over a socket, between a pool and its workers: never pickle, and apart from anything user code prints."""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any

HEADER = struct.Struct(">I")  # the length of the JSON that follows, in bytes


class Channel:
    """One end of a socket that carries JSON objects."""

    def __init__(self, connection: socket.socket, *, max_bytes: int | None = None):
        """`max_bytes`: of a message that the other end may send; None: it is trusted."""
        self._connection, self._max_bytes = connection, max_bytes
        self._buffer = bytearray()

    def send(self, message: dict[str, Any], timeout_s: float | None = None) -> None:
        """Raises OSError when the other end is gone, TimeoutError when it does not read."""
        payload = json.dumps(message).encode("ascii")
        self._connection.settimeout(timeout_s)
        self._connection.sendall(HEADER.pack(len(payload)) + payload)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None at the end of the stream. Raises TimeoutError when nothing complete arrives in time, and
        OverflowError for a message that is too long.

        What has arrived when time is up is kept for the next call. `timeout_s` bounds each read of the socket.
        """
        self._connection.settimeout(timeout_s)
        while (message := self._pop()) is None:
            try:
                chunk = self._connection.recv(1 << 16)
            except (ConnectionResetError, BrokenPipeError):
                return None
            if not chunk:
                return None
            self._buffer += chunk
        return message

    def fileno(self) -> int:
        """For a selector."""
        return self._connection.fileno()

    def has_input(self) -> bool:
        """Whether something has arrived that `receive` has not returned."""
        waiting = select.poll()  # select.select takes no descriptor above 1023, and where many episodes run there are such
        waiting.register(self._connection, select.POLLIN)
        return bool(self._buffer) or bool(waiting.poll(0))

    def _pop(self) -> dict[str, Any] | None:
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
        if self._max_bytes is not None and end > self._max_bytes:
            raise OverflowError(f"a message of {end} bytes")
        if len(self._buffer) < end:
            return None
        message = json.loads(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return message

    def close(self) -> None:
        self._connection.close()


class Unsendable(Exception):
    """What JSON cannot carry, as `a date`."""


def plain(value: Any) -> Any:
    """`value` as JSON can carry it. Raises Unsendable; the caller knows whose value it is."""
    if type(value).__module__ == "numpy":  # which is not imported for this
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(part) for key, part in value.items()}
    raise Unsendable(f"a {type(value).__name__}")
