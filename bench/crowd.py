"""Many at once: how fast clients are served together, and the memory of many sessions."""

import asyncio
import time

import docker
from client import CLIENTS, SMALL, Client, quantile
from host import cpu_s, pss_mib
from measured import POOL_SIZE, PORT, Figures, containers, refilled

SESSIONS = 50


async def measure_load(pid: int, seconds: float) -> Figures:
    """16 clients, each with a session of its own."""
    times: list[float] = []
    until = 0.0

    async def work() -> None:
        async with Client(PORT) as client, client.session() as sid:
            started.release()
            await go.wait()
            while time.perf_counter() < until:
                took_s, execution = await client.execute(sid, SMALL)
                if execution["outcome"] != "ok":
                    raise RuntimeError(f"unexpected: {execution}")
                times.append(took_s)

    started, go = asyncio.Semaphore(0), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(work())
        for _ in range(CLIENTS):
            await started.acquire()
        await asyncio.sleep(1)
        cpu_before = cpu_s(pid)
        until = time.perf_counter() + seconds
        go.set()
    return {
        "16 clients rate /s": len(times) / seconds,
        "16 clients p50 ms": quantile(times, 0.5) * 1e3,
        "16 clients p99 ms": quantile(times, 0.99) * 1e3,
        "orchestrator CPU per execution ms": (cpu_s(pid) - cpu_before) / len(times) * 1e3,
    }


async def measure_memory(api: docker.APIClient, client: Client, pid: int) -> Figures:
    """A ready container, the orchestrator with 50 sessions, and how fast the pool was refilled meanwhile."""
    await refilled(client)
    await asyncio.sleep(1)
    one = containers(api)[0]["Id"]
    processes = [int(row[1]) for row in api.top(one)["Processes"]]
    container = sum(pss_mib(process) for process in processes)
    begun = time.perf_counter()
    sids = []
    for _ in range(SESSIONS):
        status, session = await client.request("POST", "/v1/sessions", {})
        if status == 201:
            sids.append(session["id"])
    await refilled(client)
    rate = len(sids) / (time.perf_counter() - begun)
    orchestrator = pss_mib(pid)
    for sid in sids:
        await client.request("DELETE", f"/v1/sessions/{sid}")
    while (await client.request("GET", "/v1/pool"))[1]["containers"] > POOL_SIZE:
        await asyncio.sleep(0.1)
    return {
        "ready container PSS MiB": container,
        f"orchestrator with {len(sids)} sessions PSS MiB": orchestrator,
        "pool refill /s": rate,
    }
