"""What one client waits for: a warm execution, one after the other, a timeout, its output, a new session."""

import asyncio
import time

from client import SMALL, Client, quantile
from measured import Figures, refilled


async def measure_warm(client: Client) -> Figures:
    """One client: spaced, so that each execution finds a booted sandbox; then back to back."""
    async with client.session() as sid:
        figures = {}
        for name, pause_s, count in (("warm", 0.02, 300), ("back to back", 0.0, 300)):
            times = []
            for _ in range(count):
                await asyncio.sleep(pause_s)
                took_s, execution = await client.execute(sid, SMALL)
                if execution["value"] != {"hello": "you"}:
                    raise RuntimeError(f"unexpected: {execution}")
                times.append(took_s)
            figures[f"{name} p50 ms"] = quantile(times, 0.5) * 1e3
            figures[f"{name} p99 ms"] = quantile(times, 0.99) * 1e3
        late = []
        for _ in range(5):
            took_s, execution = await client.execute(sid, {"code": "while True: pass", "timeout_s": 1})
            if execution["outcome"] != "timeout":
                raise RuntimeError(f"unexpected: {execution}")
            late.append(took_s - 1)
        figures["lateness of a 1 s timeout, worst ms"] = max(late) * 1e3
        took_s, execution = await client.execute(sid, {"code": "print('x' * 10_000_000)"})
        figures["10 MB of stdout ms"] = took_s * 1e3
    return figures


async def measure_stream(client: Client) -> Figures:
    """Output on its way: from the code's write to the client, one execution after the other."""
    async with client.session() as sid:
        code = "import os, time\ntime.sleep(0.02)\nos.write(1, b'%.9f' % time.clock_gettime(time.CLOCK_MONOTONIC))"
        times = []
        for _ in range(200):
            await asyncio.sleep(0.02)
            times.append(await client.watch(sid, {"code": code}))
    return {
        "output at the client p50 ms": quantile(times, 0.5) * 1e3,
        "output at the client p99 ms": quantile(times, 0.99) * 1e3,
    }


async def measure_sessions(client: Client) -> Figures:
    """Create a session from a ready pool and get its first result."""
    times = []
    for _ in range(20):
        await refilled(client)
        await asyncio.sleep(0.3)  # its sandboxes have booted, the machine is quiet again
        begun = time.perf_counter()
        _, session = await client.request("POST", "/v1/sessions", {})
        await client.execute(session["id"], SMALL)
        times.append(time.perf_counter() - begun)
        await client.request("DELETE", f"/v1/sessions/{session['id']}")
    return {"create + first result p50 ms": quantile(times, 0.5) * 1e3}
