"""Byte streams beside the executions: many over the one channel, each with credit, so that none can flood another.

A side may send as many bytes as the other has granted. What is sent waits while the channel is busy: frames of
control, such as the answer to a ping, never queue behind more than BUSY bytes.
"""

import base64
import errno
from collections.abc import Callable
from typing import Any

from frames import CHUNK, Frame
from loop import Loop

WINDOW = 256 * 1024  # bytes granted ahead
LIMIT = 64  # streams at once that the orchestrator opened
OWN_LIMIT = 160  # streams at once that were opened here
BUSY = 128 * 1024  # bytes that wait to be written to the channel, above which streams pause


class Refused(Exception):
    """Why a stream ends without having done what it was opened for: a stable code, and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


CODES = {
    errno.ENOENT: ("file_not_found", "There is no such file"),
    errno.ENOTDIR: ("file_conflict", "A part of the path is no directory; links are not followed"),
    errno.EISDIR: ("file_conflict", "It is a directory"),
    errno.EEXIST: ("file_conflict", "There is a file of this name already"),
    errno.ENOTEMPTY: ("file_conflict", "The directory is not empty"),
    errno.ELOOP: ("file_conflict", "It is a link: links are not followed"),
    errno.EINVAL: ("file_conflict", "A directory cannot be moved into itself"),
    errno.ENXIO: ("file_conflict", "It is no regular file"),
    errno.EACCES: ("file_denied", "The permissions of the file or its directory forbid it"),
    errno.EPERM: ("file_denied", "The permissions of the file or its directory forbid it"),
    errno.ENAMETOOLONG: ("invalid_path", "The path is too long"),
    errno.ENOSPC: ("workspace_full", "The workspace is full: delete something first"),
    errno.EDQUOT: ("workspace_full", "The workspace is full: delete something first"),
    errno.EFBIG: ("file_too_large", "The file is larger than a file may be"),
}


def refusal(error: OSError) -> Refused:
    """Return what a system call's error means to who asked for a file."""
    code, message = CODES.get(error.errno or 0, ("file_failed", f"The system refused it: {error.strerror}"))
    return Refused(code, message)


class Stream:
    """One stream. Its owner sets the callbacks.

    `on_close` is called when the other side gave it up or a callback raised, not when the owner closes it.
    """

    def __init__(self, streams: "Streams", sid: str, room: int) -> None:
        self.id = sid
        self.on_data: Callable[[bytes], None] = self.grant_for
        self.on_finish: Callable[[], None] = lambda: None
        self.on_writable: Callable[[], None] = self.rest
        self.on_close: Callable[[], None] = lambda: None
        self._streams = streams
        self._room = room

    @property
    def room(self) -> int:
        """How many bytes may be sent now, at most one chunk."""
        return min(self._room, CHUNK)

    def want(self) -> None:
        """Have `on_writable` called whenever bytes may be sent, until `rest`."""
        self._streams.wait(self)

    def rest(self) -> None:
        """Have nothing to send for now."""
        self._streams.hungry.pop(self.id, None)

    def send(self, data: bytes) -> None:
        """Send at most `room` bytes."""
        self._room -= len(data)
        self._streams.send({"type": "data", "id": self.id, "data": base64.b64encode(data).decode()})

    def finish(self) -> None:
        """Say that no more bytes come from here."""
        self._streams.send({"type": "finish", "id": self.id})

    def grant(self, count: int) -> None:
        """Let the other side send so many bytes more."""
        self._streams.send({"type": "credit", "id": self.id, "count": count})

    def grant_for(self, data: bytes) -> None:
        """Take bytes that nobody wants."""
        self.grant(len(data))

    def credit(self, count: int) -> None:
        self._room += count

    def close(self, **facts: Any) -> None:
        """End the stream with what came of it."""
        self._close(None, "", facts)

    def refuse(self, refusal: Refused) -> None:
        """End the stream with the reason why nothing came of it."""
        self._close(refusal.code, refusal.message, {})

    def _close(self, code: str | None, message: str, facts: Frame) -> None:
        if self._streams.forget(self.id):
            self._streams.send({"type": "close", "id": self.id, "code": code, "message": message, "facts": facts})


Opener = Callable[[Stream, Frame], None]


class Streams:
    """The open streams by id, and those of them that want to send."""

    def __init__(self, loop: Loop, send: Callable[[Frame], None], backlog: Callable[[], int]) -> None:
        self.openers: dict[str, Opener] = {}
        self.send = send
        self.hungry: dict[str, Stream] = {}
        self._open: dict[str, Stream] = {}
        self._loop = loop
        self._backlog = backlog
        self._numbers = 0
        self._due = False

    def take(self, frame: Frame) -> None:
        """Take a frame of the orchestrator. One about a stream that has ended crossed its end: it is left alone."""
        kind, sid = frame["type"], frame["id"]
        if kind == "open":
            self._opened(sid, frame)
            return
        stream = self._open.get(sid)
        if stream is None:
            return
        if kind == "data":
            self._try(stream, lambda: stream.on_data(base64.b64decode(frame["data"])))
        elif kind == "credit":
            stream.credit(frame["count"])
            self.resume()
        elif kind == "finish":
            self._try(stream, stream.on_finish)
        elif self.forget(sid):
            stream.on_close()

    @property
    def has_room(self) -> bool:
        """Whether another stream may be opened here."""
        return self._count("a") < OWN_LIMIT

    def open(self, kind: str, **facts: Any) -> Stream | None:
        """Open a stream to the orchestrator; None when there are too many."""
        if not self.has_room:
            return None
        self._numbers += 1
        stream = self._open[f"a{self._numbers}"] = Stream(self, f"a{self._numbers}", 0)
        self.send({"type": "open", "id": stream.id, "kind": kind, "credit": WINDOW, "facts": facts})
        return stream

    def wait(self, stream: Stream) -> None:
        if stream.id in self._open:
            self.hungry[stream.id] = stream
            self.resume()

    def forget(self, sid: str) -> bool:
        """Forget a stream; False when it is unknown."""
        self.hungry.pop(sid, None)
        return self._open.pop(sid, None) is not None

    def resume(self) -> None:
        """Let streams send again, soon; the channel calls this when it has written what waited."""
        if self.hungry and not self._due and self._backlog() < BUSY:
            self._due = True
            self._loop.call_later(0, self._pump)

    def drop(self) -> None:
        """End all: an orchestrator that attaches anew knows none of them, and counts from the beginning."""
        self._numbers = 0
        for stream in list(self._open.values()):
            if self.forget(stream.id):
                stream.on_close()

    def _count(self, owner: str) -> int:
        return sum(sid.startswith(owner) for sid in self._open)

    def _opened(self, sid: str, frame: Frame) -> None:
        stream = Stream(self, sid, frame["credit"])
        crowded = self._count("o") >= LIMIT
        self._open[sid] = stream
        self._try(stream, lambda: self._start(stream, frame, crowded=crowded))

    def _start(self, stream: Stream, frame: Frame, *, crowded: bool) -> None:
        opener = self.openers.get(frame["kind"])
        if opener is None:
            raise Refused("unknown_stream", f"This agent opens no streams of the kind {frame['kind']}")
        if crowded:
            raise Refused("too_many_streams", f"More than {LIMIT} transfers at once: end some first")
        opener(stream, frame["facts"])

    def _try(self, stream: Stream, act: Callable[[], None]) -> None:
        """Let the owner act. What it refuses, and what the system refuses it, ends the stream with the reason."""
        try:
            act()
        except (Refused, OSError) as error:
            stream.refuse(error if isinstance(error, Refused) else refusal(error))
            stream.on_close()

    def _pump(self) -> None:
        """Let every stream that wants to send do so once, in turn."""
        self._due = False
        for stream in list(self.hungry.values()):
            if self._backlog() >= BUSY:
                break
            if stream.id in self.hungry and stream.room:
                self.hungry[stream.id] = self.hungry.pop(stream.id)  # to the end of the line
                self._try(stream, stream.on_writable)
        if any(stream.room for stream in self.hungry.values()):
            self.resume()
