"""The service that is measured: its process, its pool and its containers."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
from client import Client

PORT = 8975
INSTANCE = "bench"
POOL_SIZE = 4
RESULTS = Path(__file__).parent / "results"
Figures = dict[str, float]


@contextmanager
def service(*prefix: str) -> Iterator[int]:
    """Run the service for the measurement, behind a prefix such as a profiler's options; yield its pid."""
    settings = {
        "SANDBOX_PORT": PORT,
        "SANDBOX_INSTANCE": INSTANCE,
        "SANDBOX_POOL_SIZE": POOL_SIZE,
        "SANDBOX_MAX_CONTAINERS": 80,
        "SANDBOX_UID_BASE": 20000,
        "SANDBOX_WORKSPACE_LIMIT": 131072,  # for 100 MiB
        "SANDBOX_STATE_DIR": tempfile.mkdtemp(),
    }
    environ = os.environ | {name: str(value) for name, value in settings.items()}
    command = [sys.executable, *prefix, "-m", "orchestrator", "serve", "--on-exit", "remove"]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "service.log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stderr=log, stdout=log)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=1):
                    break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"bench: the service ended: see {log.name}")
                time.sleep(0.1)
        else:
            sys.exit("bench: the service did not become ready in 30 s")
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


async def refilled(client: Client) -> None:
    """Wait until the pool holds as many ready containers as it should."""
    while (await client.request("GET", "/v1/pool"))[1]["pools"][0]["ready"] < POOL_SIZE:
        await asyncio.sleep(0.01)


def containers(api: docker.APIClient) -> list[dict[str, Any]]:
    """Return the containers of the measured service."""
    return list(api.containers(filters={"label": f"sandbox.instance={INSTANCE}"}))
