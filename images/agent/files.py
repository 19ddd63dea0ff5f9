"""The workspace's files, for the orchestrator: each operation is one stream; no path ever follows a link."""

import json
import os
import secrets
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from frames import Frame
from paths import described, exists, is_plain, not_plain, parts_of, printable
from streams import Opener, Refused, Stream
from tree import descend, remove_at, walk

WALK_LIMIT = 50_000  # entries that are looked at
KNOWN = 4096  # files whose stamp is remembered, to tell what is new
ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
Stamp = tuple[int, int]  # inode and change time: a file as it was


class Files:
    """The operations, by the kind of their stream.

    `_known` says when a file with this stamp was uploaded, or named as an artifact: the clock of files ticks every few
    milliseconds, so a file of just before an execution may look as new as one of its own.
    """

    def __init__(self, workspace: Path, sweep: Callable[[Iterator[None]], None]) -> None:
        self._known: OrderedDict[Stamp, float] = OrderedDict()
        self._workspace = workspace
        self._sweep = sweep

    def openers(self) -> dict[str, Opener]:
        """Return what opens each kind of stream."""
        return {
            "read": self.read,
            "write": self.write,
            "list": self.list,
            "stat": self.stat,
            "mkdir": self.mkdir,
            "rename": self.rename,
            "delete": self.delete,
        }

    def changed(self, since_ns: int, begun: float) -> Iterator[dict[str, Any]]:
        """Yield the files that were made or changed since an execution began, by the two clocks of files and of ours."""
        for path, facts in islice(walk(self._workspace, [], recursive=True), WALK_LIMIT):
            is_new = facts.st_ctime_ns >= since_ns and stat.S_ISREG(facts.st_mode)
            if is_new and self._known.get((facts.st_ino, facts.st_ctime_ns), begun) >= begun:
                self._remember(facts)
                yield described(printable(path), facts)

    def _remember(self, facts: os.stat_result) -> None:
        self._known.setdefault((facts.st_ino, facts.st_ctime_ns), time.monotonic())
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def read(self, stream: Stream, asked: Frame) -> None:
        """Send the file's facts as one JSON piece, then its bytes from `start`, at most `length`."""
        at, name = self._parent(asked["path"])
        try:
            fd = os.open(name, os.O_RDONLY | PLAIN, dir_fd=at)
        finally:
            os.close(at)
        facts = os.fstat(fd)
        if not is_plain(facts):
            os.close(fd)
            raise not_plain(facts)
        stream.on_close = lambda: os.close(fd)
        os.lseek(fd, asked["start"], os.SEEK_SET)
        left = asked["length"]
        head: bytes | None = json.dumps(described(asked["path"], facts)).encode()

        def more() -> None:
            nonlocal head, left
            if head is not None:
                stream.send(head)
                head = None
                return
            data = os.read(fd, stream.room if left is None else min(stream.room, left))
            if data:
                left = None if left is None else left - len(data)
                stream.send(data)
            else:
                os.close(fd)
                stream.finish()
                stream.close()

        stream.on_writable = more
        stream.want()

    def write(self, stream: Stream, asked: Frame) -> None:
        """Take a file of at most `limit` bytes; it appears under its name once it is whole."""
        parts = parts_of(asked["path"])
        at, name = descend(self._workspace, parts[:-1], make=True), parts[-1]
        temporary = f".{secrets.token_hex(8)}.part"
        try:
            self._check_target(at, name)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, 0o600, dir_fd=at)
        except BaseException:  # whatever it was, no descriptor is left behind
            os.close(at)
            raise
        size = 0

        def undo() -> None:
            os.close(fd)
            try:
                os.unlink(temporary, dir_fd=at)
            except FileNotFoundError:
                pass
            os.close(at)

        def take(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size > asked["limit"]:
                raise Refused("file_too_large", f"The file is larger than {asked['limit']} bytes")
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            stream.grant(len(data))

        def finish() -> None:
            self._check_target(at, name)
            os.fchmod(fd, asked.get("mode", 0o644))
            os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
            facts = os.fstat(fd)
            self._remember(facts)
            os.close(fd)
            os.close(at)
            stream.close(**described(asked["path"], facts))

        stream.on_close, stream.on_data, stream.on_finish = undo, take, finish

    def list(self, stream: Stream, asked: Frame) -> None:
        """Send what is in a directory as JSON lines in the order of the paths: `limit` of them, behind `after`."""
        parts = parts_of(asked["path"]) if asked["path"] else []
        found = {}
        for path, facts in walk(self._workspace, parts, recursive=asked["recursive"]):
            shown = printable(path)
            if asked["after"] is None or shown > asked["after"]:
                found[shown] = facts
            if len(found) >= WALK_LIMIT:
                break
        names = sorted(found)
        page = names[: asked["limit"]]
        text = "".join(json.dumps(described(name, found[name])) + "\n" for name in page).encode()
        more = page[-1] if len(names) > len(page) else None

        def send() -> None:
            nonlocal text
            piece, text = text[: stream.room], text[stream.room :]
            if piece:
                stream.send(piece)
            else:
                stream.finish()
                stream.close(next=more)

        stream.on_writable = send
        stream.want()

    def stat(self, stream: Stream, asked: Frame) -> None:
        """Tell what a path is."""
        at, name = self._parent(asked["path"])
        try:
            facts = os.stat(name, dir_fd=at, follow_symlinks=False)
        finally:
            os.close(at)
        stream.close(**described(asked["path"], facts))

    def mkdir(self, stream: Stream, asked: Frame) -> None:
        """Make a directory and those above it; one that is there already is fine."""
        at = descend(self._workspace, parts_of(asked["path"]), make=True)
        facts = os.fstat(at)
        os.close(at)
        stream.close(**described(asked["path"], facts))

    def rename(self, stream: Stream, asked: Frame) -> None:
        """Move what is at `path` to `target`; what is there already is replaced only when `overwrite` says so."""
        at, name = self._parent(asked["path"])
        try:
            parts = parts_of(asked["target"])
            to = descend(self._workspace, parts[:-1], make=True)
            try:
                if not asked["overwrite"] and exists(to, parts[-1]):
                    raise Refused("file_conflict", "There is a file at the new path: set `overwrite` to replace it")
                os.rename(name, parts[-1], src_dir_fd=at, dst_dir_fd=to)
                facts = os.stat(parts[-1], dir_fd=to, follow_symlinks=False)
            finally:
                os.close(to)
        finally:
            os.close(at)
        stream.close(**described(asked["target"], facts))

    def delete(self, stream: Stream, asked: Frame) -> None:
        """Remove a file, a link, or a directory; one that is not empty only when `recursive` says so."""
        at, name = self._parent(asked["path"])
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=at)
            elif not asked["recursive"]:
                os.rmdir(name, dir_fd=at)
            else:
                self._remove(at, name)
        finally:
            os.close(at)
        stream.close()

    def _remove(self, at: int, name: str) -> None:
        """Take a directory out of sight at once, and remove it little by little."""
        root = os.open(self._workspace, ROOT)
        gone = f".{secrets.token_hex(8)}.gone"
        try:
            os.rename(name, gone, src_dir_fd=at, dst_dir_fd=root)
        finally:
            os.close(root)
        self.clear(gone)

    def clear(self, name: str) -> None:
        """Remove a directory of ours at the top of the workspace, if it is there, little by little."""
        root = os.open(self._workspace, ROOT)

        def steps() -> Iterator[None]:
            try:
                if exists(root, name):
                    yield from remove_at(root, name)
            finally:
                os.close(root)

        self._sweep(steps())

    def _parent(self, path: str) -> tuple[int, str]:
        parts = parts_of(path)
        return descend(self._workspace, parts[:-1]), parts[-1]

    def _check_target(self, at: int, name: str) -> None:
        """Refuse to write where something else than a plain file is."""
        try:
            facts = os.stat(name, dir_fd=at, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not is_plain(facts):
            raise not_plain(facts)
