"""Files: 100 MiB up and down through HTTP, the channel and the agent, and what that costs the orchestrator in memory."""

import time
from collections.abc import AsyncIterator

import httpx
from host import forget_peak, memory_mib

SIZE, PIECE = 100 << 20, 1 << 16  # bytes


async def zeros() -> AsyncIterator[bytes]:
    """Yield the content."""
    piece = bytes(PIECE)
    for _ in range(SIZE // PIECE):
        yield piece


async def measure_files(port: int, pid: int) -> dict[str, float]:
    """Upload, download, and return the rates and how far the orchestrator's memory rose meanwhile."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        session = (await client.post("/v1/sessions", json={})).json()["id"]
        path = f"/v1/sessions/{session}/files/big"
        await client.put(path, content=bytes(PIECE))
        before = memory_mib(pid)
        forget_peak(pid)
        begun = time.perf_counter()
        answer = await client.put(path, content=zeros())
        up_s = time.perf_counter() - begun
        begun, received = time.perf_counter(), 0
        async with client.stream("GET", path) as response:
            async for piece in response.aiter_raw(PIECE):
                received += len(piece)
        down_s = time.perf_counter() - begun
        if answer.json().get("size_bytes") != SIZE or received != SIZE:
            raise RuntimeError(f"100 MiB did not arrive: {answer.text}, {received} bytes came back")
        await client.delete(f"/v1/sessions/{session}")
    return {
        "100 MiB up MiB/s": SIZE / up_s / 2**20,
        "100 MiB down MiB/s": SIZE / down_s / 2**20,
        "orchestrator growth over 100 MiB up and down MiB": max(0.0, memory_mib(pid, "VmHWM") - before),
    }
