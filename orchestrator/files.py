"""The files of a container's workspace, as its agent serves them: every operation is one stream.

What the agent answers is hostile input; what it refuses comes as an error of our tree.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from orchestrator import errors
from orchestrator.container import Container
from orchestrator.errors import ContainerLost, SandboxError
from orchestrator.frames import Described
from orchestrator.models import File, FilePage
from orchestrator.streams import Stream, StreamRefused

T = TypeVar("T")
STEP = 64 * 1024  # bytes of a transfer
MOVE_S = 60.0  # for the agent to move one step
# Of an archive nothing may move while its sandbox works. The agent ends that after 300 s of CPU, of which code beside it may
# take as much again.
ARCHIVE_S = 600.0
UNREAD_S = 30.0  # a client may go away between the open file and its first byte
PAGE_BYTES = 64 << 20  # of one page of a listing: more is a lie
ERRORS: dict[str, type[SandboxError]] = {
    kind.code: kind
    for kind in (
        errors.InvalidPath,
        errors.FileNotFound,
        errors.FileConflict,
        errors.FileDenied,
        errors.FileTooLarge,
        errors.WorkspaceFull,
        errors.InvalidArchive,
    )
}


class _Next(msgspec.Struct, frozen=True):
    next: str | None


class _Unpacked(msgspec.Struct, frozen=True):
    files: Annotated[int, Meta(ge=0)] = 0


class _Transfer:
    """A stream that moves bytes. Its agent has `step_s` for each STEP of them, and for its last word.

    Only what is waited for the agent counts. What the client takes does not.
    """

    def __init__(self, stream: Stream, step_s: float = MOVE_S) -> None:
        self._stream = stream
        self._step_s = self._left_s = step_s
        self._count = 0

    async def read(self) -> bytes:
        """Return the next bytes, empty at the end."""
        data = await self._wait(self._stream.read())
        self._count += len(data)
        if self._count >= STEP:
            self._count, self._left_s = 0, self._step_s
        return data

    async def send(self, data: AsyncIterable[bytes]) -> dict[str, Any]:
        """Send all, as it comes and the agent takes it; return what came of it."""
        async for piece in data:
            for start in range(0, len(piece), STEP):
                self._left_s = self._step_s
                await self._wait(self._stream.write(piece[start : start + STEP]))
        self._stream.finish()
        self._left_s = self._step_s
        return await self._wait(self._stream.outcome())

    async def _wait(self, step: Awaitable[T]) -> T:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with asyncio.timeout(self._left_s):
                result = await step
        except TimeoutError:
            raise ContainerLost(
                "The agent stands still: the transfer was given up, its session goes on. Try again"
            ) from None
        self._left_s -= loop.time() - begun
        return result


class Download:
    """A file that is being read: its `file`, and its bytes, which somebody has to begin to read soon.

    No more than `length` are taken, however many the agent sends: of a file that grows, or of a lie.
    """

    def __init__(self, file: File, stream: Stream, length: int) -> None:
        self.file = file
        self._left = length
        self._stream = stream
        self._transfer = _Transfer(stream)
        self._forgotten = asyncio.get_running_loop().call_later(UNREAD_S, stream.close)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes as they come, then close."""
        self._forgotten.cancel()
        try:
            with _translated():
                while self._left and (data := await self._transfer.read()):
                    piece = data[: self._left]
                    self._left -= len(piece)
                    yield piece
        finally:
            self._stream.close()


class Workspace:
    """The operations on one container's files. Each may also raise ContainerLost."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._open = container.streams.open

    async def read(self, path: str, *, start: int = 0, length: int | None = None) -> Download:
        """Open a file for reading, `length` bytes from `start`. FileNotFound, FileConflict or InvalidPath."""
        with _closed(self._open("read", path=path, start=start, length=length), on_success=False) as stream:
            file = self._file(await self._in_time(stream.read()))
            rest = max(0, file.size_bytes - start)
            return Download(file, stream, rest if length is None else min(rest, length))

    async def write(self, path: str, data: AsyncIterable[bytes], *, limit: int, mode: int = 0o644) -> File:
        """Write a file of at most `limit` bytes, and the directories above it. It appears once it is whole."""
        with _closed(self._open("write", path=path, limit=limit, mode=mode)) as stream:
            return self._told(await _Transfer(stream).send(data), Described).file()

    async def stat(self, path: str) -> File:
        """Return what a path is."""
        return self._told(await self._ask("stat", path=path), Described).file()

    async def make_directory(self, path: str) -> File:
        """Make a directory and those above it."""
        return self._told(await self._ask("mkdir", path=path), Described).file()

    async def rename(self, path: str, target: str, *, overwrite: bool) -> File:
        """Move a file or directory."""
        return self._told(await self._ask("rename", path=path, target=target, overwrite=overwrite), Described).file()

    async def delete(self, path: str, *, recursive: bool) -> None:
        """Delete a file, a link, or a directory."""
        await self._ask("delete", path=path, recursive=recursive)

    async def list(self, path: str, *, recursive: bool, limit: int, after: str | None) -> FilePage:
        """List a directory, in the order of the paths."""
        with _closed(self._open("list", path=path, recursive=recursive, limit=limit, after=after)) as stream:
            text, end = await self._in_time(self._whole(stream))
            more = self._told(end, _Next)
        return FilePage(files=[self._file(line) for line in text.splitlines()], next=more.next)

    async def pack(self, path: str) -> AsyncIterator[bytes]:
        """Yield a tar of a directory."""
        with _closed(self._open("pack", path=path)) as stream:
            transfer = _Transfer(stream, ARCHIVE_S)
            while data := await transfer.read():
                yield data

    async def unpack(self, path: str, data: AsyncIterable[bytes], *, limit: int) -> int:
        """Unpack a tar that holds at most `limit` bytes; return how many files it had. All of it arrives, or nothing."""
        with _closed(self._open("unpack", path=path, limit=limit)) as stream:
            return self._told(await _Transfer(stream, ARCHIVE_S).send(data), _Unpacked).files

    async def _ask(self, kind: str, **asked: Any) -> dict[str, Any]:
        with _closed(self._open(kind, **asked)) as stream:
            return await self._in_time(stream.outcome())

    def _in_time(self, answer: Awaitable[T]) -> Awaitable[T]:
        return self._container.answered(answer, "a file")

    async def _whole(self, stream: Stream) -> tuple[bytearray, dict[str, Any]]:
        text = bytearray()
        async for data in stream:
            text += data
            if len(text) > PAGE_BYTES:
                raise self._lie("a list that is too long")
        return text, await stream.outcome()

    def _file(self, line: bytes | bytearray) -> File:
        try:
            return msgspec.json.decode(line, type=Described).file()
        except msgspec.DecodeError as error:
            raise self._lie(str(error)) from None

    def _told(self, facts: dict[str, Any], kind: type[T]) -> T:
        try:
            return msgspec.convert(facts, kind)
        except msgspec.ValidationError as error:
            raise self._lie(str(error)) from None

    def _lie(self, what: str) -> ContainerLost:
        reason = f"the agent told something impossible of a file: {what}"
        self._container.lose(reason)
        return ContainerLost(reason)


@contextmanager
def _closed(stream: Stream, *, on_success: bool = True) -> Iterator[Stream]:
    """Give a stream up at the end, or only when something goes wrong; what the agent refuses is an error of ours."""
    try:
        with _translated():
            yield stream
    except BaseException:  # cancelled as well
        stream.close()
        raise
    if on_success:
        stream.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except StreamRefused as refusal:
        if refusal.code == "too_many_streams":
            raise errors.TooManyRequests(refusal.message, retry_after_s=1) from None
        raise ERRORS.get(refusal.code, errors.FileConflict)(refusal.message) from None
