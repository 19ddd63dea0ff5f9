"""The floors of this machine: what the engine, a sandbox and a request cost without the service's doing."""

import json
import os
import time
from pathlib import Path

import docker
from client import CLIENTS, Client, quantile
from measured import Figures, containers, refilled

IMAGE = os.environ.get("SANDBOX_IMAGE", "sandbox-python:latest")
FLOOR = Path(__file__).with_name("floor.py")


async def measure_floors(api: docker.APIClient, client: Client) -> Figures:
    """C and the other floors."""
    async with client.session():
        await refilled(client)
        name = containers(api)[0]["Id"]
        user = api.inspect_container(name)["Config"]["User"]
        code = FLOOR.read_text()
        command = ["python3", "-I", "-S", "-c", code, "100", str(CLIENTS), "5"]
        output = api.exec_start(api.exec_create(name, command, user=user)["Id"]).decode()
        floor = json.loads(output)
        execs, runs, posts = [], [], []
        for _ in range(10):
            begun = time.perf_counter()
            api.exec_start(api.exec_create(name, ["python3", "-c", "pass"], user=user)["Id"])
            execs.append(time.perf_counter() - begun)
        for _ in range(5):
            begun = time.perf_counter()
            one = api.create_container(IMAGE, ["-c", "pass"], entrypoint=["python3"])["Id"]
            api.start(one)
            api.wait(one)
            runs.append(time.perf_counter() - begun)
            api.remove_container(one)
        for _ in range(300):
            begun = time.perf_counter()
            await client.request("GET", "/health")
            posts.append(time.perf_counter() - begun)
    return {
        "C p50 ms": quantile(floor["serial_s"], 0.5) * 1e3,
        "C wide rate /s": floor["wide_rate"],
        "python3 -I -S p50 ms": quantile(floor["plain_s"], 0.5) * 1e3,
        "docker exec p50 ms": quantile(execs, 0.5) * 1e3,
        "docker run p50 ms": quantile(runs, 0.5) * 1e3,
        "empty request p50 ms": quantile(posts, 0.5) * 1e3,
    }
