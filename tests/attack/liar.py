"""An agent that lies: honest until an execution comes, then it does what its code names. Runs in a container.

It stands beside the real agent's modules, in place of their `__main__`.
"""

import base64
import json
import os
import time
from pathlib import Path

from agent import Agent
from frames import Frame

RESULT = {
    "outcome": "ok",
    "exit_code": 0,
    "signal": None,
    "message": "",
    "launch_s": 0.1,
    "wall_s": 0.1,
    "cpu_s": 0.1,
    "max_rss_bytes": 1,
    "truncated": [],
}
MIB = 1 << 20
CHANNEL: list[int] = []  # the descriptor that the orchestrator listens to


def write(data: bytes) -> None:
    """Write bytes to the orchestrator."""
    view = memoryview(data)
    while view:
        view = view[os.write(CHANNEL[0], view) :]


def send(kind: str, **fields: object) -> None:
    """Send a frame."""
    write(json.dumps({"type": kind, **fields}).encode() + b"\n")


def output(eid: str, seq: int, data: bytes = b"x") -> None:
    """Send a piece of stdout."""
    send("output", id=eid, seq=seq, stream="stdout", data=base64.b64encode(data).decode())


def result(eid: str, seq: int = 0, **facts: object) -> None:
    """Send a result."""
    send("result", id=eid, seq=seq, **{**RESULT, **facts})


def lie(what: str, eid: str, ping: int) -> None:
    """Do one of the things that an honest agent never does."""
    match what:
        case "endless":
            for _ in range(4096):
                write(b"x" * MIB)
        case "unknown type":
            send("surprise", id=eid)
        case "no type":
            write(b'{"id":"x"}\n')
        case "wrong id":
            result("e0000")
        case "result twice":
            result(eid)
            result(eid)
        case "output after result":
            result(eid)
            output(eid, 1)
        case "output out of order":
            output(eid, 2)
        case "too much output":
            for seq in range(1, 4096):
                output(eid, seq, b"x" * 32768)
        case "invalid utf-8":
            write(b'{"type":"fault","message":"\xff\xfe"}\n')
        case "tiny frames":
            write(b"{}\n" * 1_000_000)
        case "empty lines":
            write(b"\n" * 1_000_000)
            result(eid)
        case "many pongs":
            write((json.dumps({"type": "pong", "number": ping}) + "\n").encode() * 1_000_000)
            result(eid)
        case "deep":
            write(b"[" * 60000 + b"\n")
        case "huge number":
            write(b'{"type":"pong","number":' + b"9" * 60000 + b"}\n")
        case "odd result":
            result(eid, exit_code=-1)
        case "no number":
            write(
                json.dumps({"type": "result", "id": eid, "seq": 0, **RESULT, "wall_s": float("nan")}).encode() + b"\n"
            )
        case "forged log":
            send("fault", message='x\n{"event":"fake"}\r\x1b[2J')
        case "noise on stderr":
            for _ in range(64):
                os.write(2, b"\x1b[2J\n" * (MIB // 5))
            result(eid)
        case "deaf" | "nothing":
            time.sleep(3600)


class Liar(Agent):
    """The real agent, but for what it answers."""

    _ping = 0

    def _on_ping(self, frame: Frame) -> None:
        self._ping = frame["number"]
        super()._on_ping(frame)

    def _on_bind(self, frame: Frame) -> None:
        if frame["session"].startswith("astray"):
            self._send({"type": "bound", "session": "another"})
        else:
            super()._on_bind(frame)
        if frame["session"].startswith("deaf"):
            time.sleep(3600)

    def _on_execute(self, frame: Frame) -> None:
        what = frame["job"]["code"]
        if what == "second hello":
            self._greet()
            return
        CHANNEL[:] = [self._channel.out_fd]
        os.set_blocking(CHANNEL[0], True)
        lie(what, frame["id"], self._ping)
        os.set_blocking(CHANNEL[0], False)


os.umask(0o077)
Liar(Path("/scratch"), Path("/workspace")).run()
