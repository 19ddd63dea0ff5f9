"""What lasts: a thousand sessions, and thousands of executions in one; afterwards everything is back at its level."""

import os
import time
from pathlib import Path
from typing import Any

from tests.attack.after import container_of
from tests.attack.cases import check
from tests.attack.live import PREBOOT, Live, until
from tests.attack.sight import DockerSight, agent_of, host_processes, staying, zombies

CYCLES, EXECUTIONS = 1000, 2000
REMOVAL_S = 30.0
SAMPLES = 20
GROWTH = 16 << 20  # bytes of memory that a run may add
SLOPE_KB = 2048  # per thousand, over the later half


class Course:
    """Readings of a quantity while something is repeated."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float]] = []

    def note(self, count: int, value: float) -> None:
        """Take a reading after so many rounds."""
        self._points.append((count, value))

    def slope(self) -> float:
        """Return the growth for each thousand rounds over the later half: the line that fits best."""
        points = self._points[len(self._points) // 2 :]
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        return 1000 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0

    def told(self) -> str:
        """Return first, last and slope, of bytes."""
        (_, first), (_, last) = self._points[0], self._points[-1]
        return (
            f"{first / 2**20:.1f} MiB, then {last / 2**20:.1f}, {self.slope() / 1024:+.0f} KiB per thousand at the end"
        )


def cycles(live: Live, short: bool) -> str:
    """life-19: after many sessions, everything is back at its level."""
    sight = live.sight
    assert isinstance(sight, DockerSight)

    def level() -> dict[str, Any]:
        until(live.is_ready, REMOVAL_S, "the pool is not full")
        size = int(live.pool()["target"])
        until(lambda: len(sight.containers()) == size, REMOVAL_S, "containers are left")
        time.sleep(1)  # the last connections to the engine end
        volumes = sight.api.volumes(filters={"dangling": True})["Volumes"] or []
        return {
            "volumes": len(volumes),
            "files": live.files(),
            "threads": live.threads(),
            "rss": live.memory(),
            "zombies": len(zombies([p for p in host_processes() if p.parent == live.process.pid])),
        }

    for _ in range(10):  # caches, threads of the pool and the like are made once
        cycle(live)
    before = level()
    begun = time.monotonic()
    course = Course()
    rounds = 50 if short else CYCLES
    for count in range(rounds):
        if count % max(1, rounds // SAMPLES) == 0:
            course.note(count, live.memory())
        cycle(live)
    took_s = time.monotonic() - begun
    after = level()
    course.note(rounds, after["rss"])
    check(after["volumes"] <= before["volumes"], f"volumes: {before['volumes']}, then {after['volumes']}")
    check(after["files"] <= before["files"] + 8, f"descriptors: {before['files']}, then {after['files']}")
    check(after["threads"] <= max(before["threads"], 20), f"threads: {before['threads']}, then {after['threads']}")
    check(after["zombies"] == 0, f"{after['zombies']} zombies")
    grown = after["rss"] - before["rss"]
    check(grown < GROWTH, f"the orchestrator grew by {grown >> 10} KiB")
    check(short or course.slope() < SLOPE_KB << 10, f"its memory grows: {course.told()}")
    return (
        f"{rounds} sessions, {rounds / took_s:.1f}/s; volumes {after['volumes']}, descriptors {before['files']}, then "
        f"{after['files']}, threads {before['threads']}, then {after['threads']}, no zombies; memory {course.told()}"
    )


def cycle(live: Live) -> None:
    """Start a session, execute, end it."""
    with live.session() as sid:
        live.is_usable(sid)


def many_executions(live: Live, short: bool) -> str:
    """life-21: many executions in one session leave no zombies, and grow neither the agent nor the service."""
    rounds = 150 if short else EXECUTIONS
    with live.session() as sid:
        container = container_of(live, sid)
        for _ in range(80):  # more than a session remembers
            live.is_usable(sid)
        agent = agent_of(live.sight.processes(container))
        service_course, agent_course = Course(), Course()
        begun = time.monotonic()
        files = agent_files(agent)
        for count in range(rounds):
            if count % max(1, rounds // SAMPLES) == 0:
                service_course.note(count, live.memory())
                agent_course.note(count, agent_memory(agent))
            live.is_usable(sid)
        took_s = time.monotonic() - begun
        service_course.note(rounds, live.memory())
        agent_course.note(rounds, agent_memory(agent))
        left = staying(lambda: zombies(live.sight.processes(container)))
        check(not left, f"{len(left)} zombies in the container")
        count = len(live.sight.processes(container))
        check(count <= 2 + 3 * PREBOOT, f"{count} processes in the container")
        check(abs(agent_files(agent) - files) <= 32, f"the agent's descriptors: {files}, then {agent_files(agent)}")
        for who, course in (("service", service_course), ("agent", agent_course)):
            check(short or course.slope() < SLOPE_KB << 10, f"the memory of the {who} grows: {course.told()}")
    return (
        f"{rounds} executions, {rounds / took_s:.0f}/s, {count} processes in the container, no zombies; memory of the "
        f"service {service_course.told()}, of the agent {agent_course.told()}"
    )


def agent_memory(pid: int | None) -> int:
    """Return bytes that an agent holds; 0 where its processes are not this host's."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def agent_files(pid: int | None) -> int:
    """Return how many descriptors an agent has open; 0 where its processes are not this host's."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0
