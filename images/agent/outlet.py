"""The way out: connections to a port of the loopback, each carried to the orchestrator as one stream.

Nothing is parsed here, and nothing decided: bytes go both ways, each way ends by itself, and what breaks off on one side
breaks off on the other.
"""

import socket
import struct
import sys
from collections import deque
from collections.abc import Callable

from loop import READ, WRITE, Loop
from streams import WINDOW, Refused, Stream, Streams

ADDRESS = "127.0.0.1"
BACKLOG = 128
ACCEPTS = 16  # connections that are taken before others have their turn
RETRY_S = 1.0
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER for no time: closing sends a reset


class Outlet:
    """The listening socket, while the session may use the network, and its connections."""

    def __init__(self, loop: Loop, streams: Streams) -> None:
        self._loop = loop
        self._streams = streams
        self._port: int | None = None
        self._listener: socket.socket | None = None
        self._watched = False
        self._open: set[Connection] = set()

    def listen(self, port: int | None) -> None:
        """Listen on the port; with None on none, and break off every connection."""
        if port == self._port:
            return
        self._port = port
        if self._listener is not None:
            self._watch(wanted=False)
            self._listener.close()
            self._listener = None
        if port is not None:
            self._bind()
            return
        for connection in list(self._open):
            connection.abort(Refused("closed", "The session's network was closed"))

    def _bind(self) -> None:
        if self._port is None or self._listener is not None:
            return
        listener = socket.socket()
        try:
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((ADDRESS, self._port))
            listener.listen(BACKLOG)
        except OSError as error:  # a program of the session has the port
            print(f"the network cannot be served: {error}", file=sys.stderr)
            listener.close()
            self._loop.call_later(RETRY_S, self._bind)
            return
        self._listener = listener
        self._watch(wanted=True)

    def _watch(self, *, wanted: bool) -> None:
        if self._listener is None or wanted == self._watched:
            return
        self._watched = wanted
        if wanted:
            self._loop.add(self._listener.fileno(), self._accept)
        else:
            self._loop.remove(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            if self._listener is None:
                return
            if not self._streams.has_room:  # others wait in the backlog until one ends
                self._watch(wanted=False)
                return
            try:
                made, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # no descriptor or memory for it just now
                self._watch(wanted=False)
                self._loop.call_later(RETRY_S, lambda: self._watch(wanted=True))
                return
            stream = self._streams.open("connect")
            if stream is None:
                made.close()
                return
            self._open.add(Connection(self._loop, made, stream, self._ended))

    def _ended(self, connection: "Connection") -> None:
        self._open.discard(connection)
        self._watch(wanted=True)


class Connection:
    """One connection and its stream. Each direction has its own end."""

    def __init__(self, loop: Loop, made: socket.socket, stream: Stream, ended: Callable[["Connection"], None]) -> None:
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop = loop
        self._socket = made
        self._stream = stream
        self._ended = ended
        self._pending: deque[memoryview] = deque()
        self._taken = 0
        self._waits_for_data = False
        self._watched = 0
        self._sent_all = False  # what the program sends
        self._got_all = False  # what it is to get
        stream.on_data, stream.on_finish = self._take, self._finish
        stream.on_writable, stream.on_close = self._read, self._break
        stream.want()

    def abort(self, reason: Refused) -> None:
        """Break off both sides."""
        self._stream.refuse(reason)
        self._break()

    def _read(self) -> None:
        """Send what the program has written, as far as the stream takes it; else wait for more."""
        try:
            data = self._socket.recv(self._stream.room)
        except BlockingIOError:
            self._stream.rest()
            self._waits_for_data = True
            self._watch()
            return
        except OSError:
            self.abort(Refused("connection_reset", "The program broke off the connection"))
            return
        if data:
            self._stream.send(data)
            return
        self._stream.rest()
        self._sent_all = True
        self._stream.finish()
        self._settle()

    def _take(self, data: bytes) -> None:
        self._pending.append(memoryview(data))
        if len(self._pending) == 1:
            self._write()

    def _finish(self) -> None:
        self._got_all = True
        if not self._pending:
            self._shut()

    def _write(self) -> None:
        try:
            while self._pending:
                view = self._pending[0]
                count = self._socket.send(view)
                self._taken += count
                if count == len(view):
                    self._pending.popleft()
                else:
                    self._pending[0] = view[count:]
        except BlockingIOError:
            pass
        except OSError:
            self.abort(Refused("connection_reset", "The program broke off the connection"))
            return
        if self._taken >= WINDOW // 4:
            self._stream.grant(self._taken)
            self._taken = 0
        self._watch()
        if self._got_all and not self._pending:
            self._shut()

    def _shut(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone, which reading will find
            pass
        self._settle()

    def _settle(self) -> None:
        """End the stream once both directions have ended."""
        if self._sent_all and self._got_all and not self._pending:
            self._stream.close()
            self._close()

    def _ready(self) -> None:
        if self._pending:
            self._write()
        if self._waits_for_data and self._socket.fileno() >= 0:
            self._waits_for_data = False
            self._watch()
            self._stream.want()

    def _watch(self) -> None:
        events = (READ if self._waits_for_data else 0) | (WRITE if self._pending else 0)
        if events == self._watched:
            return
        if self._watched:
            self._loop.remove(self._socket.fileno())
        if events:
            self._loop.add(self._socket.fileno(), self._ready, events)
        self._watched = events

    def _break(self) -> None:
        if self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            self._close()

    def _close(self) -> None:
        self._pending.clear()
        self._waits_for_data = False
        self._watch()
        self._socket.close()
        self._ended(self)
