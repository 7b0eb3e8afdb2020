"""Connections of the watch: JSON objects, one a line, over TCP; nothing here ever waits."""

from __future__ import annotations

import json
import socket
from typing import Any

from mftcoder_coba.errors import UserError

CONNECT_SECONDS = 60.0
MAX_PENDING_BYTES = 1 << 16
# Of what was sent without an answer from the other machine's kernel (RFC 5482; Linux only): a machine that has lost its power or its network
# says no goodbye. A process that is alive and busy is answered for by its kernel.
UNANSWERED_MILLISECONDS = 60_000


class Link:
    """One connection."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MILLISECONDS)
        self._connection = connection
        self._received = b""
        self._pending = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Hands over what the connection takes now, and keeps the rest for the next call. To one that has stopped reading, nothing more."""
        if len(self._pending) < MAX_PENDING_BYTES:
            self._pending += json.dumps(message).encode() + b"\n"
        try:
            del self._pending[: self._connection.send(self._pending)]
        except OSError:
            pass  # full, or closed: `receive` tells of the end

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None at the end of the connection, or of its making sense."""
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if data and all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self._connection.close()


def listen() -> socket.socket:
    """A server on a free port of this machine."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0), backlog=1024)
    server.setblocking(False)
    return server


def connect(host: str, port: int) -> Link:
    """Raises UserError where the machines do not reach each other."""
    try:
        return Link(socket.create_connection((host, port), CONNECT_SECONDS))
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} does not reach rank 0 at {host}, port {port}: {error}",
            "the network",
            "let the machines of a run reach each other on all TCP ports",
        ) from error
