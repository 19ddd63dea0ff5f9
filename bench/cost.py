"""What one warm execution costs in CPU, process by process: `.venv/bin/python bench/cost.py [COUNT]`.

CPU time tells more than wall time where the machine is busy. The sandboxes are what is left of the containers' cgroup
when the agent is taken away.
"""

import asyncio
import os
import sys
from pathlib import Path

import docker
from client import SMALL, Client
from host import cpu_s
from measured import PORT, containers, service

CGROUPS = ("/sys/fs/cgroup/cpuacct/docker/{}/cpuacct.usage", "/sys/fs/cgroup/system.slice/docker-{}.scope/cpu.stat")


def named(name: str) -> list[int]:
    """Return the pids of all processes of a name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "comm").read_text().strip().startswith(name):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def cgroup_s(container: str) -> float:
    """Return the CPU seconds of a container, under cgroup v1 or v2."""
    usage, stat = (Path(path.format(container)) for path in CGROUPS)
    if usage.exists():
        return int(usage.read_text()) / 1e9
    return int(stat.read_text().split()[1]) / 1e6


def snapshot(api: docker.APIClient, pid: int, container: str) -> dict[str, float]:
    """Return the CPU seconds used so far."""
    agents = [int(row[1]) for row in api.top(container)["Processes"] if "/opt/sandbox/agent" in row[-1]]
    agent = sum(cpu_s(agent) for agent in agents if "init" not in Path(f"/proc/{agent}/comm").read_text())
    engine = sum(cpu_s(one) for name in ("dockerd", "containerd") for one in named(name))
    return {
        "orchestrator": cpu_s(pid),
        "agent": agent,
        "dockerd and containerd": engine,
        "container": cgroup_s(container),
        "this client": sum(os.times()[:2]),
    }


def listed(api: docker.APIClient, container: str) -> bytes:
    """Return the names in a container's workspace."""
    user = api.inspect_container(container)["Config"]["User"]
    return bytes(api.exec_start(api.exec_create(container, ["ls", "/workspace"], user=user)["Id"]))


async def measure(api: docker.APIClient, pid: int, count: int) -> None:
    """Execute one after another in one session, and print what each part used."""
    async with Client(PORT) as client:
        _, session = await client.request("POST", "/v1/sessions", {})
        await client.execute(session["id"], SMALL)
        marker = {"code": "open('/workspace/mark', 'w')"}
        await client.execute(session["id"], marker)
        container = next(one["Id"] for one in containers(api) if b"mark" in listed(api, one["Id"]))
        await asyncio.sleep(1)
        before = snapshot(api, pid, container)
        for _ in range(count):
            await client.execute(session["id"], SMALL)
        await asyncio.sleep(1)
        after = snapshot(api, pid, container)
    cost = {name: (after[name] - before[name]) / count * 1e3 for name in before}
    cost["sandboxes"] = cost.pop("container") - cost["agent"]
    for name, cost_ms in sorted(cost.items(), key=lambda item: -item[1]):
        print(f"{name:<24}{cost_ms:8.2f} ms")
    print(f"{'all':<24}{sum(cost.values()):8.2f} ms")


def main() -> None:
    """Run the service and measure."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    api = docker.APIClient(version="auto")
    with service() as pid:
        asyncio.run(measure(api, pid, count))


if __name__ == "__main__":
    main()
