"""HTTP on one connection: uvicorn's, with bounds on the size of a request's head, on the time that one takes, and on how
long a client may take nothing of its answer.
"""

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from contextlib import suppress
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT = 64 * 1024  # bytes of a request that are not its body
FRAMING = 16  # bytes of chunked framing that come with one of body, at most
PATIENCE_S = 20.0  # a request may take so long, and longer by what its size allows
LEAST_RATE = 1024  # bytes a second
LOOK_S = 5.0
STALLED_S = 30.0  # a client that takes nothing of its answer for so long is cut off


class Protocol(HttpToolsProtocol):
    """A connection. `_begun` is when the request began that has not arrived in full, None between requests;
    `_headed` tells whether its head has. `_unsent` is how much of an answer waited at the last look, `_stalled_s` how
    long that has been the same.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begun: float | None = self.loop.time()
        self._headed = False
        self._taken = self._body = 0
        self._unsent, self._stalled_s = 0, 0.0
        self._looking = self.loop.call_later(LOOK_S, self._look)

    def handle_websocket_upgrade(self) -> None:
        self._looking.cancel()  # the connection is another protocol's from here on
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._taken += len(data)
        super().data_received(data)
        if self._begun is not None and self._taken > HEAD_LIMIT + (1 + FRAMING) * self._body:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = self.loop.time()
        self._headed = False
        self._taken, self._body = 1, 0  # how much of the first read belongs to it is not known

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._headed = True

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._begun = None

    def _look(self) -> None:
        """Close the connection of a client that is too slow, or that goes on sending what was answered already."""
        self._looking = self.loop.call_later(LOOK_S, self._look)
        self._look_at_reader()
        if self._begun is None:
            return
        if self._headed and self.cycle.response_complete:
            self.transport.abort()
        elif self.flow.read_paused:  # it waits for us
            self._begun += LOOK_S
        elif self.loop.time() - self._begun > PATIENCE_S + self._taken / LEAST_RATE:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _look_at_reader(self) -> None:
        """Cut off a client that has stopped reading: what waits for it holds memory, and its sandbox."""
        connection = self.transport.get_extra_info("socket")
        waiting = self.transport.get_write_buffer_size()
        unsent = waiting + untaken(connection)
        is_stalled = waiting > 0 and unsent == self._unsent
        self._unsent, self._stalled_s = unsent, self._stalled_s + LOOK_S if is_stalled else 0.0
        if self._stalled_s >= STALLED_S:
            # With a reset: else the kernel keeps its own megabytes for this client, and goes on offering them.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def _refuse(self, status: HTTPStatus) -> None:
        if self.transport.is_closing():
            return
        if self._taken and not (self._headed and self.cycle.response_started):
            head = f"HTTP/1.1 {status} {status.phrase}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            self.transport.write(head.encode())
        self.transport.close()


def untaken(connection: socket.socket) -> int:
    """Return how many bytes the system holds for a client that has not taken them yet; it may hold megabytes."""
    count = bytearray(4)
    with suppress(OSError):  # where it does not tell
        fcntl.ioctl(connection, termios.TIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)
