"""What must hold after a case: each check looks before the attack, lets it happen, and looks again.

A check is a generator over the scene: what it does up to its `yield` comes before the attack, the rest after it.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tests.attack.cases import Case, Failed, NotApplicable, check
from tests.attack.live import PREBOOT, Json, Live, until
from tests.attack.sight import DockerSight, Process, agent_of, mark, staying, strays, zombies

NO_CONTAINER = "n/a: the local engine has no containers to look into"
RSS_GROWTH = 64 << 20
REMOVAL_S = 30.0
BYSTANDER_S = 1.0
CONTROL_BYTES = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]")


@dataclass
class Scene:
    """One case in one session. `execution` is what the attack's own execution came to."""

    live: Live
    sid: str
    case: Case
    execution: Json | None = None

    @cached_property
    def container(self) -> str:
        """The name of the session's container."""
        return container_of(self.live, self.sid)

    def processes(self) -> list[Process]:
        """Return the processes of the session's container."""
        return self.live.sight.processes(self.container)

    def docker(self) -> DockerSight:
        """Return the Docker Engine's sight; NotApplicable on another engine."""
        if not isinstance(self.live.sight, DockerSight):
            raise NotApplicable(NO_CONTAINER)
        return self.live.sight


Watch = Callable[[Scene], Iterator[None]]


def container_of(live: Live, sid: str) -> str:
    """Return the name of the container that serves a session: the one in which a file of it appears."""
    path = mark()
    execution = live.execute(sid, f"open({path!r}, 'w').close()")
    check(execution["outcome"] == "ok", f"no mark could be left: {execution}")
    found = [name for name in live.sight.containers() if live.sight.holds(name, path)]
    check(len(found) == 1, f"{len(found)} containers hold the session's files")
    return found[0]


def no_processes_left(scene: Scene) -> Iterator[None]:
    """Nothing but the agent and the sandboxes that wait is alive."""
    _ = scene.container
    yield
    left = staying(lambda: strays(scene.processes(), PREBOOT))
    told = [process for process in scene.processes() if process.pid in left]
    check(not left, f"alive after the result: {told}")


def no_zombies_in_container(scene: Scene) -> Iterator[None]:
    _ = scene.container
    yield
    left = staying(lambda: zombies(scene.processes()))
    check(not left, f"{len(left)} zombies in the container")


def agent_alive(scene: Scene) -> Iterator[None]:
    """The agent is the process that it was."""
    before = agent_of(scene.processes())
    check(before is not None, "the agent was not found")
    yield
    check(agent_of(scene.processes()) == before, "the agent is not the process that it was")


def session_usable(scene: Scene) -> Iterator[None]:
    yield
    scene.live.is_usable(scene.sid)


def other_sessions_unaffected(scene: Scene) -> Iterator[None]:
    """Another session goes on working while the attack runs, and afterwards."""
    times: list[float] = []
    faults: list[str] = []
    over = threading.Event()

    def bystand(sid: str) -> None:
        while not over.is_set():
            begun = time.monotonic()
            try:
                scene.live.is_usable(sid)
            except Failed as error:
                faults.append(str(error))
            times.append(time.monotonic() - begun)
            time.sleep(0.05)

    with scene.live.session() as sid:
        thread = threading.Thread(target=bystand, args=(sid,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        scene.live.is_usable(sid)
    check(not faults, f"another session failed meanwhile: {faults[:1]}")
    late = quantile(times, 0.9)
    check(late < BYSTANDER_S, f"another session's executions took {late:.2f} s (p90 of {len(times)})")


def workspace_file_alive_does_not_grow(scene: Scene) -> Iterator[None]:
    code = "import os; print(os.path.getsize('/workspace/alive') if os.path.exists('/workspace/alive') else 0)"
    yield
    first = scene.live.execute(scene.sid, code)["stdout"]
    time.sleep(0.3)
    second = scene.live.execute(scene.sid, code)["stdout"]
    check(first == second, f"something still writes: {first.strip()} bytes, then {second.strip()}")


def host_disk_unchanged(scene: Scene) -> Iterator[None]:
    """Nothing was written into the container's layer, which is the host's disk."""
    sight = scene.docker()
    before = sight.changes(scene.container)
    yield
    check(sight.changes(scene.container) == before, "the container's layer on the host's disk has changed")


def cleanup_removes_everything(scene: Scene) -> Iterator[None]:
    """Ending the session leaves no container."""
    container = scene.container
    yield
    answer = scene.live.client.delete(f"/v1/sessions/{scene.sid}")
    check(answer.status_code == 204, f"the session could not be ended: {answer.status_code}")
    until(lambda: container not in scene.live.sight.containers(), REMOVAL_S, "the container was not removed")


def file_list_valid_json(scene: Scene) -> Iterator[None]:
    yield
    answer = scene.live.client.get(f"/v1/sessions/{scene.sid}/files", params={"recursive": "true"})
    if answer.status_code in (404, 405):
        raise NotApplicable("no such route: GET /v1/sessions/{sid}/files (all else passed)")
    check(answer.status_code == 200, f"the list of files answered {answer.status_code}")
    json.loads(answer.content.decode())


def orchestrator_rss_growth_below_64MiB(scene: Scene) -> Iterator[None]:  # noqa: N802 - the name is the file's
    scene.live.forget_peak()
    before = scene.live.memory()
    yield
    grown = scene.live.memory("VmHWM") - before
    check(grown < RSS_GROWTH, f"the orchestrator grew by {grown >> 20} MiB")


def stdout_truncated_flag(scene: Scene) -> Iterator[None]:
    yield
    check(scene.execution is not None and "stdout" in scene.execution["truncated"], "`truncated` does not name stdout")


def control_channel_in_sync(scene: Scene) -> Iterator[None]:
    """Each of the next executions gets its own answer."""
    yield
    for number in range(5):
        execution = scene.live.execute(scene.sid, f"print({number})\ndef handler(event): return {number}")
        told = (execution["outcome"], execution["stdout"], execution["value"])
        check(told == ("ok", f"{number}\n", number), f"execution {number} came back as {told}")


def one_log_line_per_event(scene: Scene) -> Iterator[None]:
    """One execution makes one line, whatever its request carried."""
    since = scene.live.log_size()
    yield
    execution = scene.live.execute(scene.sid, "print(1)")
    lines = scene.live.events("execution_done", since)
    count = sum(line["execution"] == execution["id"] for line in lines)
    check(count == 1, f"{count} log lines for one execution")
    events = [line for line in scene.live.log_lines(since) if b"fake" in line and not line.startswith(b"{")]
    check(not events, f"a forged line is in the log: {events[:1]!r}")


def log_line_is_valid_json(scene: Scene) -> Iterator[None]:
    since = scene.live.log_size()
    yield
    for line in scene.live.log_lines(since):
        try:
            event = json.loads(line)
        except ValueError:
            raise Failed(f"a log line is no JSON: {line[:200]!r}") from None
        check(isinstance(event, dict) and "event" in event, f"a log line names no event: {line[:200]!r}")


def no_raw_control_bytes_in_logs(scene: Scene) -> Iterator[None]:
    since = scene.live.log_size()
    yield
    found = CONTROL_BYTES.findall(scene.live.log.read_bytes()[since:])
    check(not found, f"control bytes in the log: {found[:5]!r}")


def metrics_series_count_constant(scene: Scene) -> Iterator[None]:
    scene.live.client.get("/unknown/first")
    scene.live.samples()  # these two may make series, once
    before = set(scene.live.samples())
    yield
    added = set(scene.live.samples()) - before
    check(not added, f"{len(added)} new series, such as {sorted(added)[:2]}")


def exactly_one_container_removed(scene: Scene) -> Iterator[None]:
    """The session's container is destroyed, once, and no other."""
    sight = scene.docker()
    container = scene.container
    until(lambda: len(sight.containers()) == 1 + int(scene.live.pool()["target"]), REMOVAL_S, "the pool is not settled")
    begun = time.time()
    yield
    until(lambda: container not in sight.containers(), REMOVAL_S, "the container was not removed")
    removed = sight.removals(begun, time.time())
    check(removed == [container], f"removed: {removed}")


def no_500(scene: Scene) -> Iterator[None]:
    since = scene.live.log_size()
    yield
    check(not scene.live.events("request_failed", since), "a request failed inside the service")


CHECKS: dict[str, Watch] = {
    watch.__name__: watch
    for watch in (
        no_processes_left,
        no_zombies_in_container,
        agent_alive,
        session_usable,
        other_sessions_unaffected,
        workspace_file_alive_does_not_grow,
        host_disk_unchanged,
        cleanup_removes_everything,
        file_list_valid_json,
        orchestrator_rss_growth_below_64MiB,
        stdout_truncated_flag,
        control_channel_in_sync,
        one_log_line_per_event,
        log_line_is_valid_json,
        no_raw_control_bytes_in_logs,
        metrics_series_count_constant,
        exactly_one_container_removed,
        no_500,
    )
}
CHECKS["workspace_can_be_deleted"] = cleanup_removes_everything


@contextlib.contextmanager
def watched(scene: Scene) -> Iterator[None]:
    """Surround the attack with the checks that the case names; what cannot be checked is told last."""
    watches = [CHECKS[name](scene) for name in scene.case.expect.get("after", [])]
    for watch in watches:
        next(watch)
    missing: NotApplicable | None = None
    try:
        yield
        for watch in watches:
            try:
                next(watch, None)
            except NotApplicable as error:
                missing = error
    finally:
        for watch in watches:
            watch.close()  # type: ignore[attr-defined]
    if missing is not None:
        raise missing


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
