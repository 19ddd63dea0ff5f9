"""Containers and agents in trouble: killed, stopped, removed, flooded, used up, left idle."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.attack.after import container_of, quantile
from tests.attack.cases import NotApplicable, check
from tests.attack.live import Json, Live, serve, until
from tests.attack.sight import INSTANCE_LABEL, DockerSight, agent_of
from tests.live import IMAGE

REMOVAL_S = 30.0
LOST_S = 2.0  # an execution whose container is gone ends within this time
NOISE_S = 1.0  # what a busy machine may add to it
FORK_AND_ALLOCATE = """
import mmap, os, time
end_at = time.monotonic() + {seconds}
killed = 0
while time.monotonic() < end_at:
    if (pid := os.fork()) == 0:
        m = mmap.mmap(-1, 1 << 30)
        while True: m.write(b'x' * (1 << 20))
    killed += os.waitpid(pid, 0)[1] == 9
print(killed)
"""


def docker_sight(live: Live) -> DockerSight:
    """Return the sight of a service on the Docker engine."""
    assert isinstance(live.sight, DockerSight)
    return live.sight


def agent_pid(live: Live, container: str) -> int:
    """Return the agent's pid on this host; NotApplicable when the engine's processes are not this host's."""
    pid = agent_of(live.sight.processes(container))
    check(pid is not None, "the agent was not found")
    assert pid is not None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        command = ""
    if "agent" not in command:
        raise NotApplicable("the engine's processes are not visible on this host")
    return pid


def lost_meanwhile(live: Live, hurt: Callable[[str], object], *, within_s: float, timeout_s: float = 30) -> str:
    """Hurt a session's container while an execution runs: it ends as lost in time, its session too, others do not."""
    sight = docker_sight(live)
    before = live.metric('sandbox_sessions_ended_total{reason="lost",template="python"}')
    told: list[Json] = []
    with live.session() as other:
        sid = live.open()
        container = container_of(live, sid)
        runner = threading.Thread(
            target=lambda: told.append(live.execute(sid, "import time; time.sleep(60)", timeout_s=timeout_s))
        )
        runner.start()
        until(lambda: running(live, sid), 5, "the execution did not start")
        time.sleep(0.2)
        hurt(container)
        begun = time.monotonic()
        runner.join(within_s + 30)
        took_s = time.monotonic() - begun
        check(told, "the execution hangs, or was answered by an error")
        check(told[0]["outcome"] == "lost", f"the outcome is {told[0]['outcome']}: {told[0]['error']}")
        check(took_s < within_s, f"the execution ended after {took_s:.1f} s")
        until(lambda: live.client.get(f"/v1/sessions/{sid}").status_code == 410, 5, "the session did not end as lost")
        until(lambda: container not in sight.containers(), REMOVAL_S, "the container was not removed")
        counted = live.metric('sandbox_sessions_ended_total{reason="lost",template="python"}') - before
        check(counted == 1, f"{counted:g} lost sessions were counted")
        live.is_usable(other)
        until(live.is_ready, REMOVAL_S, "the pool was not filled again")
    return f"the execution ended as lost after {took_s:.1f} s, its session with it, no other"


def running(live: Live, sid: str) -> bool:
    """Tell whether an execution of the session runs."""
    executions = live.client.get(f"/v1/sessions/{sid}/executions").json()["executions"]
    return any(execution["outcome"] is None for execution in executions)


def container_killed(live: Live, short: bool) -> str:
    """life-02."""
    return lost_meanwhile(live, docker_sight(live).api.kill, within_s=LOST_S + NOISE_S)


def agent_killed(live: Live, short: bool) -> str:
    """life-03."""
    return lost_meanwhile(
        live, lambda container: os.kill(agent_pid(live, container), signal.SIGKILL), within_s=LOST_S + NOISE_S
    )


def agent_stopped(live: Live, short: bool) -> str:
    """life-04: by SIGSTOP and by `docker pause`, under the service's own deadline and under its heartbeat."""
    grace_s = float(str(live.settings["grace_seconds"]))

    told: list[str] = []

    def stop(container: str) -> None:
        os.kill(agent_pid(live, container), signal.SIGSTOP)

    for hurt, timeout_s, within_s in (
        (stop, 1, 1 + grace_s + NOISE_S),
        (docker_sight(live).api.pause, 30, 10),
        (stop, 30, 10),
        (docker_sight(live).api.pause, 1, 1 + grace_s + NOISE_S),
    )[: 2 if short else 4]:
        told.append(lost_meanwhile(live, hurt, within_s=within_s, timeout_s=timeout_s))
    return "; ".join(told)


def pool_removed(live: Live, short: bool) -> str:
    """life-10: what was removed behind the service's back is not handed out."""
    with serve(pool_size=3) as own:
        sight = docker_sight(own)
        for pause_s in (0.0, 2.0) if short else (0.0, 0.02, 0.05, 0.5, 2.0):
            until(own.is_ready, REMOVAL_S, "the pool is not full")
            for container in sight.containers():
                sight.remove(container)
            time.sleep(pause_s)
            with own.session() as sid:
                own.is_usable(sid)
        full_s = until(own.is_ready, REMOVAL_S, "the pool was not filled again")
        for _ in range(10):
            until(lambda: len(sight.containers()) <= 3, REMOVAL_S, "the pool is filled above its size")
            time.sleep(0.1)
    return f"full again after {full_s:.1f} s; no dead container was handed out"


def foreign_containers(live: Live, short: bool) -> None:
    """life-14: containers of others survive start, reconciling and end, whatever they are called."""
    sight = DockerSight("nobody")
    mine = f"attack-foreign-{os.getpid()}"
    foreign: list[str] = []
    try:
        for name, labels in (
            (f"sandbox-{mine}-abcdef", {}),
            (f"{mine}-labelled", {"sandbox.template": "python"}),
            (f"{mine}-other", {INSTANCE_LABEL: f"{mine}-x", "sandbox.template": "python"}),
        ):
            command = ["-c", "import time; time.sleep(600)"]
            created = sight.api.create_container(IMAGE, command, entrypoint=["python3"], name=name, labels=labels)
            foreign.append(created["Id"])
            sight.api.start(created["Id"])
        with serve(instance=mine, pool_size=1) as own:
            with own.session() as sid:
                own.is_usable(sid)
            time.sleep(3)  # three looks at the engine
            own.end()
        states = [
            (sight.inspect(container) or {"State": {"Status": "gone"}})["State"]["Status"] for container in foreign
        ]
        check(states == ["running"] * 3, f"containers of others are now {states}")
    finally:
        for container in foreign:
            sight.remove(container)
        sight.api.close()


def oom_flood(live: Live, short: bool) -> None:
    """life-16: very many OOM kills in one container slow down nobody, and are told apart from an ordinary end."""
    seconds = 4 if short else 12
    told: list[Json] = []
    times: list[float] = []
    with live.session() as bomber, live.session() as other:
        code = FORK_AND_ALLOCATE.format(seconds=seconds)
        runner = threading.Thread(target=lambda: told.append(live.execute(bomber, code, timeout_s=60)))
        runner.start()
        while runner.is_alive():
            begun = time.monotonic()
            live.is_usable(other)
            times.append(time.monotonic() - begun)
            time.sleep(0.05)
        check(quantile(times, 0.9) < 1, f"others waited {quantile(times, 0.9):.2f} s (p90)")
        check(told and told[0]["outcome"] in ("ok", "oom"), f"the flood ended as {told}")
        live.is_usable(bomber)
        ended = live.execute(bomber, "import os; os._exit(137)")
        check(ended["outcome"] == "error", f"an ordinary exit(137) after the flood is called {ended['outcome']}")


def idle_moment(live: Live, short: bool) -> None:
    """life-20: an idle timeout never takes a session from a running or just accepted execution."""
    with live.session(idle_timeout_s=1) as sid:
        told = live.execute(sid, "import time; time.sleep(3); print('done')", timeout_s=10)
        check(told["stdout"] == "done\n", f"the execution did not survive the idle timeout: {told['outcome']}")
        live.is_usable(sid)
    for step in range(5 if short else 20):
        sid = live.open(idle_timeout_s=0.3)
        live.is_usable(sid)
        time.sleep(0.29 + step * 0.002)
        body = {"code": "print(6 * 7)"}
        answer = live.client.post(f"/v1/sessions/{sid}/executions", json=body)
        check(
            answer.status_code in (200, 410), f"at the moment of the timeout: {answer.status_code} {answer.text[:200]}"
        )
        if answer.status_code == 200:
            told = answer.json()
            check(told["outcome"] == "ok", f"accepted at the moment of the timeout, then {told['outcome']}")
        live.client.delete(f"/v1/sessions/{sid}")
