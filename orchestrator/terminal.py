"""One terminal of a container, as its agent serves it. What the agent answers is hostile input."""

from typing import Annotated

import msgspec
from msgspec import Meta

from orchestrator.container import Container
from orchestrator.errors import ContainerLost, TerminalFailed, TooManyRequests
from orchestrator.models import Exit, Resize
from orchestrator.streams import Stream, StreamRefused

SHELL = ["bash", "-l"]
PROMPT = r"\h:\w\$ "


class _End(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    exit_code: Annotated[int, Meta(ge=0, le=255)]
    signal: Annotated[int, Meta(ge=1, le=64)] | None


class Terminal:
    """A pseudo-terminal and the program in its sandbox. Every wait ends with ContainerLost when the container is lost."""

    def __init__(self, container: Container, stream: Stream, job: bytes) -> None:
        self._container = container
        self._stream = stream
        self._job = job
        self.read = stream.read

    async def write(self, data: bytes) -> None:
        """Type, as the program takes it; what is typed after its end is lost."""
        job, self._job = self._job, b""
        try:
            await self._stream.write(job + data)
        except StreamRefused:
            return

    async def resize(self, size: Resize) -> None:
        """Tell the terminal its size."""
        stream = self._container.streams.open("resize", terminal=self._stream.id, cols=size.cols, rows=size.rows)
        try:
            await self._container.answered(stream.outcome(), "a terminal's size")
        except StreamRefused as refusal:
            raise TooManyRequests(refusal.message, retry_after_s=1) from None
        finally:
            stream.close()

    async def end(self) -> Exit:
        """Wait until the program has ended and its output is here. TerminalFailed when there was none."""
        try:
            facts = await self._stream.outcome()
        except StreamRefused as refusal:
            if refusal.code == "too_many_streams":
                raise TooManyRequests(refusal.message, retry_after_s=1) from None
            raise TerminalFailed(refusal.message) from None
        try:
            end = msgspec.convert(facts, _End)
        except msgspec.ValidationError as error:
            reason = f"the agent told something impossible of a terminal: {error}"
            self._container.lose(reason)
            raise ContainerLost(reason) from None
        return Exit(exit_code=end.exit_code, signal=end.signal)

    def close(self) -> None:
        """Give it up: everything in its sandbox is killed."""
        self._stream.close()


def open_terminal(
    container: Container, *, size: Resize, command: str | None, term: str, env: dict[str, str]
) -> Terminal:
    """Open a terminal with a shell, or with a line for bash. The first `write` starts the program."""
    argv = SHELL if command is None else ["bash", "-c", command]
    job = msgspec.json.encode({"argv": argv, "env": {"PS1": PROMPT} | env | {"TERM": term}})
    stream = container.streams.open("terminal", cols=size.cols, rows=size.rows, job_bytes=len(job))
    return Terminal(container, stream, job)
