"""Egress: throughput, time to the first byte, memory and pings while much flows, beside a direct connection.

Runs a service in this process on the Docker engine, and the hosts that are reached in another one. Prints a table and
writes bench/results/egress.json. Read the ratios: absolute figures depend on the machine and on what else it does.
"""

import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvloop
from host import memory_mib

from orchestrator.models import Execution, ExecutionRequest, SessionRequest
from orchestrator.service import Orchestrator
from orchestrator.session import Session
from orchestrator.settings import Settings

HERE = Path(__file__).parent
TAG = os.environ.get("SANDBOX_TEST_TAG", "latest")
MB = 1_000_000
TOTAL = 200 * MB
FIRST_BYTES = 50
EXECUTIONS = 60
PIECE = 1 << 18

# What runs in the sandbox, and, for comparison, here: the same with a connection of its own.
CLIENT = """
import socket, time

PIECE = bytes(1 << 18)

def opened(port, proxy):
    made = socket.create_connection(("127.0.0.1", proxy or port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if proxy:
        made.sendall(f"CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
        head = b""
        while not head.endswith(b"\\r\\n\\r\\n"):
            head += made.recv(1)
        assert b" 200 " in head, head
    return made

def handler(event):
    port, proxy, total = event["port"], event.get("proxy"), event["total"]
    begun = time.perf_counter()
    if event["what"] == "down":
        with opened(port, proxy) as made:
            made.sendall(b"d%12d" % total)
            got = 0
            while data := made.recv(1 << 18):
                got += len(data)
        assert got == total, got
    elif event["what"] == "up":
        with opened(port, proxy) as made:
            made.sendall(b"u%12d" % total)
            left = total
            while left:
                left -= made.send(PIECE[:left])
            assert made.recv(1) == b"!"
    else:
        times = []
        for _ in range(total):
            begun = time.perf_counter()
            with opened(port, proxy) as made:
                made.sendall(b"d%12d" % 1)
                assert made.recv(1)
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]
    return time.perf_counter() - begun
"""


def far_side(pipe: Connection) -> None:
    """Send or swallow what each connection asks for; in a process of its own."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await reader.readexactly(13)
            left = int(asked[1:])
            while left and asked[:1] == b"d":
                piece = min(left, PIECE)
                writer.write(bytes(piece))
                await writer.drain()
                left -= piece
            while left:
                left -= len(await reader.read(PIECE))
            if asked[:1] == b"u":
                writer.write(b"!")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(main())


def agent_of(uid: int) -> int:
    """Return the pid of the agent that runs under a user."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if path.stat().st_uid == uid and b"/opt/sandbox/agent" in words and words[0].endswith(b"python3"):
                return int(path.name)
        except OSError:
            continue
    raise RuntimeError("the agent is not on this machine")


class Bench:
    """One session with a network, and what was measured in it."""

    def __init__(self, service: Orchestrator, session: Session, port: int) -> None:
        self.figures: dict[str, float] = {}
        self._sessions = service.sessions
        self._session = session
        self._port = port

    async def execute(self, **fields: Any) -> Execution:
        execution = await self._sessions.execute(self._session.id, ExecutionRequest(timeout_s=300, **fields))
        if execution.outcome != "ok":
            raise RuntimeError(f"an execution failed: {execution}")
        return execution

    async def inside(self, what: str, total: int) -> float:
        """Return what the client measured in the sandbox."""
        event = {"what": what, "port": self._port, "proxy": 3128, "total": total}
        return float(msgspec.json.decode((await self.execute(code=CLIENT, event=event)).value))

    async def outside(self, what: str, total: int) -> float:
        """Return what it measures with a connection of its own, beside the service's loop."""
        namespace: dict[str, Any] = {}
        exec(CLIENT, namespace)
        event = {"what": what, "port": self._port, "total": total}
        return float(await asyncio.to_thread(namespace["handler"], event))

    async def watched(self, what: str) -> None:
        """Let much flow; meanwhile ping, and look at the memory of both sides."""
        agent = agent_of(self._session.container.spec.uid)
        before, before_agent = memory_mib(os.getpid()), memory_mib(agent)
        flow = asyncio.create_task(self.inside(what, TOTAL))
        waits, peak, peak_agent = [], before, before_agent
        while not flow.done():
            waits.append(await self.ping())
            peak, peak_agent = max(peak, memory_mib(os.getpid())), max(peak_agent, memory_mib(agent))
            await asyncio.sleep(0.02)
        took_s = await flow
        self.figures |= {
            f"{what} MB/s": TOTAL / MB / took_s,
            f"{what} ping p50 ms": statistics.median(waits) * 1e3,
            f"{what} ping p95 ms": sorted(waits)[int(len(waits) * 0.95)] * 1e3,
            f"{what} ping max ms": max(waits) * 1e3,
            f"{what} service grew MiB": peak - before,
            f"{what} agent grew MiB": peak_agent - before_agent,
        }

    async def ping(self) -> float:
        """Return how long the agent took to answer a ping."""
        container = self._session.container
        begun = time.perf_counter()
        container.beat()
        while not container.heartbeat.answered:
            await asyncio.sleep(0.0005)  # a busy loop would take the CPU from what is measured
        return time.perf_counter() - begun

    async def warm_p50(self) -> float:
        """Return the median time of a small execution."""
        times = []
        for _ in range(EXECUTIONS):
            begun = time.perf_counter()
            await self.execute(code="def handler(event): return event", event={})
            times.append(time.perf_counter() - begun)
            await asyncio.sleep(0.03)  # for the next sandbox to boot
        return statistics.median(times)


async def measure(port: int) -> dict[str, float]:
    """Measure in one session with a network, and the warm execution also in one without."""
    settings = Settings(
        image=f"sandbox-python:{TAG}",
        instance=f"bench-egress-{os.getpid()}",
        state_dir=tempfile.mkdtemp(),
        uid_base=20500,
        pool_size=1,
        on_exit="remove",
        egress_allow=f"*,127.0.0.1:{port}",
        heartbeat_seconds=3600,
    )
    service = Orchestrator(settings)
    async with service.run():
        sessions = service.sessions
        closed = Bench(service, await sessions.create(SessionRequest(network="none")), port)
        asked = msgspec.convert({"network": {"allow": [f"127.0.0.1:{port}"]}}, SessionRequest)
        bench = Bench(service, await sessions.create(asked), port)
        quiet = [await bench.ping() for _ in range(100)]
        figures = bench.figures
        figures["ping p50 ms, nothing flows"] = statistics.median(quiet) * 1e3
        figures["execution p50 ms, network none"] = await closed.warm_p50() * 1e3
        figures["execution p50 ms, with a network"] = await bench.warm_p50() * 1e3
        for what in ("down", "up"):
            await bench.watched(what)
            figures[f"{what} direct MB/s"] = TOTAL / MB / await bench.outside(what, TOTAL)
        figures["first byte ms"] = await bench.inside("first", FIRST_BYTES) * 1e3
        figures["first byte direct ms"] = await bench.outside("first", FIRST_BYTES) * 1e3
    return figures


def main() -> None:
    """Run the far side, measure, print."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    ours, theirs = multiprocessing.Pipe()
    far = multiprocessing.Process(target=far_side, args=(theirs,), daemon=True)
    far.start()
    try:
        figures = uvloop.run(measure(ours.recv()))
    finally:
        far.terminate()
    for name, value in figures.items():
        print(f"{name:36} {value:10.2f}")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "egress.json").write_text(json.dumps({"host": socket.gethostname(), **figures}, indent=1))


if __name__ == "__main__":
    main()
