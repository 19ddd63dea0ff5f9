"""An agent that lies: it greets like an honest one, then does what the execution's code names. Runs in a container."""

import base64
import json
import os
import sys
import time
from typing import Any

HONEST = {
    "uid": 1000,
    "capabilities": 0,
    "no_new_privs": 1,
    "seccomp_filters": 2,
    "processes": 3,
    "limits": {"NPROC": 64, "NOFILE": 256, "FSIZE": 1, "DATA": 1},
    "interfaces": ["lo"],
    "unshare": "EPERM",
    "connect": "ENETUNREACH",
    "write_root": "EROFS",
    "write_usr": "EROFS",
    "write_proc": "EROFS",
    "agent_uid": os.getuid(),
    "agent_seccomp": 1,
}
RESULT = {
    "outcome": "ok",
    "exit_code": 0,
    "signal": None,
    "message": "",
    "wall_s": 0.1,
    "cpu_s": 0.1,
    "max_rss_bytes": 1,
    "truncated": [],
}
MIB = 1 << 20


def write(data: bytes) -> None:
    """Write bytes to the orchestrator."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


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
        case "second hello":
            send("hello", version=1, nonce="x", session=None, canary=HONEST, executions=[])
        case "forged log":
            send("fault", message='x\n{"event":"fake"}\r\x1b[2J')
        case "noise on stderr":
            for _ in range(64):
                os.write(2, b"\x1b[2J\n" * (MIB // 5))
            result(eid)
        case "deaf" | "nothing":
            time.sleep(3600)


def main() -> None:
    """Greet, bind, and lie when an execution comes."""
    ping = 0
    for line in sys.stdin.buffer:
        frame: dict[str, Any] = json.loads(line) if line.strip() else {}
        match frame.get("type"):
            case "hello":
                send("hello", version=1, nonce=frame["nonce"], session=None, canary=HONEST, executions=[])
            case "bind":
                if frame["session"].startswith("astray"):
                    send("bound", session="another")
                else:
                    send("bound", session=frame["session"])
                if frame["session"].startswith("deaf"):
                    time.sleep(3600)
            case "ping":
                ping = frame["number"]
                send("pong", number=ping)
            case "execute":
                lie(frame["job"]["code"], frame["id"], ping)


main()
