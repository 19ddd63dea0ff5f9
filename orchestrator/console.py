"""This terminal as a session's: what is typed here goes there, what is shown there comes here."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.models import Exit
from orchestrator.remote import RemoteTerminal
from orchestrator.sdk import SandboxClient

STDIN, STDOUT = 0, 1
READ_SIZE = 32 * 1024
LEAVE = b"\x1d"  # Ctrl-]
LARGEST = 1000
END_OF_INPUT = b"\x04"  # what a terminal makes of Ctrl-D


async def attach(client: SandboxClient, session_id: str, *, command: str | None, term: str) -> Exit | None:
    """Use a terminal until its program ends, or Ctrl-] is typed: then return None."""
    async with client.terminal(session_id, **size(), command=command, term=term) as remote:
        with raw():
            tasks = [asyncio.create_task(work(remote)) for work in (show, type_in, follow_size)]
            try:
                done, _ = await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return remote.exit


async def show(remote: RemoteTerminal) -> None:
    """Write what comes; the other side waits while this terminal does not take it."""
    async for data in remote:
        while data:
            data = data[os.write(STDOUT, data) :]  # noqa: PLW2901 - what is left of it


async def type_in(remote: RemoteTerminal) -> None:
    """Send what is typed until Ctrl-]; at the end of a pipe, what ends input, and wait for the program."""
    is_typed = sys.stdin.isatty()
    sent = b""
    while data := await read():
        if is_typed and LEAVE in data:
            await remote.send(data.partition(LEAVE)[0])
            return
        await remote.send(sent := data)
    # Of a line that has begun, the first one ends the line alone.
    await remote.send(END_OF_INPUT if sent.endswith(b"\n") else 2 * END_OF_INPUT)
    await asyncio.Event().wait()


async def read() -> bytes:
    """Return what is typed next; not in a thread, which would outlive the terminal."""
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    try:
        loop.add_reader(STDIN, ready.set)
    except PermissionError:  # a file, which is always ready
        return os.read(STDIN, READ_SIZE)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(STDIN)
    return os.read(STDIN, READ_SIZE)


async def follow_size(remote: RemoteTerminal) -> None:
    """Tell every new size of this terminal."""
    changed = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, changed.set)
    while True:
        await changed.wait()
        changed.clear()
        await remote.resize(**size())


def size() -> dict[str, int]:
    """Return the size of this terminal, or what serves without one."""
    try:
        cols, rows = os.get_terminal_size(STDOUT)
    except OSError:
        cols = rows = 0
    return {"cols": min(cols, LARGEST) or 80, "rows": min(rows, LARGEST) or 24}


@contextmanager
def raw() -> Iterator[None]:
    """Have every key sent as it is; at the end the terminal is as before."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(STDIN)
    tty.setraw(STDIN)
    try:
        yield
    finally:
        termios.tcsetattr(STDIN, termios.TCSADRAIN, before)
