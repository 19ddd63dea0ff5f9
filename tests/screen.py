"""A person at a terminal emulator, for tests: the command line on a pseudo-terminal, its output on a screen."""

import os
import sys
import time

import pexpect
import pyte

SOON_S = 20.0


class Screen:
    """`orchestrator terminal` as a person sees and uses it."""

    def __init__(self, url: str, sid: str, *options: str, cols: int, rows: int) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOX_")}
        self._client = pexpect.spawn(
            sys.executable,
            ["-m", "orchestrator", "terminal", sid, "--url", url, *options],
            dimensions=(rows, cols),
            env=kept | {"TERM": "xterm"},
        )
        self._screen = pyte.Screen(cols, rows)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """The lines of the screen that are not empty, without the spaces at their ends."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def at(self, row: int, col: int, count: int) -> str:
        """What stands at a place of the screen."""
        return str(self._screen.display[row][col : col + count])

    def type(self, keys: str) -> None:
        self._client.send(keys)

    def resize(self, cols: int, rows: int) -> None:
        self._screen.resize(rows, cols)
        self._client.setwinsize(rows, cols)

    def until(self, text: str) -> None:
        """Wait until a text ends a line of the screen."""
        end_at = time.monotonic() + SOON_S
        while not any(line.endswith(text) for line in self.lines):
            assert time.monotonic() < end_at, f"{text!r} is not on the screen: {self.lines}"
            self._look()

    def exit_code(self) -> int | None:
        """Wait for the end of the client; return its exit code."""
        self._client.expect(pexpect.EOF, timeout=SOON_S)
        self._feed(self._client.before)
        self._client.close()
        code: int | None = self._client.exitstatus
        return code

    def _feed(self, data: object) -> None:
        assert isinstance(data, bytes), "as it is without an encoding, whatever the stubs say"
        self._stream.feed(data)

    def _look(self) -> None:
        try:
            self._feed(self._client.read_nonblocking(65536, timeout=0.1))
        except pexpect.TIMEOUT:
            return
        except pexpect.EOF:
            raise AssertionError(f"the client ended: {self.lines}") from None
