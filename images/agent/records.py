"""Inside the sandbox of a context: what its interpreter sends out, in whole records.

A record is a line `KIND NUMBER`, where a `D` (display) and a `V` (value or error) announce so many bytes that follow,
and `E CODE CELL` ends the cell.
"""

import _thread
import base64
import contextlib
import json
import os
import sys

OWN_PID = os.getpid()
BASE64 = {"image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf"}


class Records:
    """The way out: whole records, whatever interrupts or runs beside. What the user forked has none."""

    def __init__(self, fd):
        self._fd = fd
        self._lock = _thread.RLock()
        self._main = _thread.get_ident()
        self.writing = False  # and in the thread that an interrupt goes to
        self.interrupted = False

    def write(self, head, body=b""):
        """Write one record, after everything that was printed before it."""
        if os.getpid() != OWN_PID:
            return
        flush()
        with self._lock:
            self.writing = own = _thread.get_ident() == self._main
            try:
                data = memoryview(head.encode() + b"\n" + body)
                while data:
                    data = data[os.write(self._fd, data) :]
            finally:
                self.writing = False
        if own and self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def show(self, data, metadata=None, *, main=False, transient=None, update=False):
        """Write a display: an object of MIME types and, without a slash in their names, facts about it."""
        item = {mime: text for mime, value in data.items() if (text := carried(mime, value)) is not None}
        if not item:
            return
        facts = {"main": main, "display_id": (transient or {}).get("display_id"), "update": update}
        facts["metadata"] = {mime: about for mime, about in (metadata or {}).items() if about and mime in item}
        item |= {name: text for name, fact in facts.items() if fact and (text := encoded(fact)) is not None}
        pairs = (f"{json.dumps(name)}:{text}" for name, text in item.items())
        body = ("{" + ",".join(pairs) + "}\n").encode()
        self.write(f"D {len(body)}", body)


def flush():
    """Let go of what a stream of the user's may hold back."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user's code closed or replaced it
            stream.flush()


def carried(mime, value):
    """Return a display's data as JSON text, None when it cannot be carried; bytes as base64, as in a notebook."""
    if isinstance(value, bytes):
        value = base64.b64encode(value).decode()
    elif not mime.endswith("json") and not isinstance(value, str):
        value = str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
        value = value.rstrip("\n") if mime in BASE64 else value
    return encoded(value)


def encoded(value, limit=None):
    """Return the value as JSON text, None when JSON cannot carry it or it is longer than the limit."""
    pieces, size = [], 0
    try:
        for piece in json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).iterencode(value):
            pieces.append(piece)
            size += len(piece.encode())
            if limit is not None and size > limit:
                return None
        return "".join(pieces)
    except Exception:  # the user's own classes may raise anything
        return None
