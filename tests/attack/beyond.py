"""Attacks that attacks.json does not have: each was found by playing with the service, and each once did harm."""

import threading
import time
from collections.abc import Callable

from tests.attack.after import container_of, quantile
from tests.attack.cases import Case, check
from tests.attack.live import PREBOOT, Live, serve, until
from tests.attack.sight import DockerSight, staying, strays

SCRATCH_ENTRIES = 3 + PREBOOT + 4  # etc, the bootstrap, the harness, those that wait, those that are just being removed
FLOOD_INODES = """
import os, time
n = 0
try:
    while True: os.close(os.open(f'/tmp/{n}', os.O_CREAT)); n += 1
except OSError as error: print(error.strerror)
time.sleep(3)
"""
FORK_ALL = """
import os, time
end_at = time.monotonic() + 3
while time.monotonic() < end_at:
    try:
        if os.fork() == 0: time.sleep(30)
    except OSError: time.sleep(0.01)
"""
SHADOW = """
import sys
for name in {*sys.stdlib_module_names, '_sitebuiltins', 'sitecustomize', 'usercustomize'} - {'sys', 'builtins', 'posix'}:
    with open(f'/workspace/{name}.py', 'w') as file:
        file.write(f"import posix; posix.close(posix.open('/workspace/ran-{name}', posix.O_CREAT | posix.O_WRONLY))")
"""
WHICH_RAN = "import posix; print([name for name in posix.listdir('.') if name.startswith('ran-')])"
CHILD_RAISES = """
import os
def handler(event):
    if (pid := os.fork()) == 0: raise ValueError('of the child')
    os.waitpid(pid, 0)
    return 'of the parent'
"""
TINY_WRITES = """
import os, time
end_at = time.monotonic() + {seconds}
while time.monotonic() < end_at:
    os.write(1, b'x'); os.write(2, b'y')
"""


def inodes_beside(live: Live, short: bool) -> None:
    """While one execution holds all inodes of /tmp others cannot start; afterwards they can: nothing has leaked."""
    with live.session() as sid:
        container = container_of(live, sid)
        flood = threading.Thread(target=live.execute, args=(sid, FLOOD_INODES), kwargs={"timeout_s": 10})
        flood.start()
        time.sleep(0.5)
        for _ in range(6):
            told = live.execute(sid, "print(1)", timeout_s=0.5)
            check(told["outcome"] in ("ok", "timeout"), f"beside the flood an execution ended as {told['outcome']}")
        flood.join()
        for _ in range(5):
            live.is_usable(sid)
        scratch_is_swept(live, container)


def processes_beside(live: Live, short: bool) -> None:
    """Executions that together take every process of the container leave a session that works."""
    with live.session() as sid:
        container = container_of(live, sid)
        threads = [
            threading.Thread(target=live.execute, args=(sid, FORK_ALL), kwargs={"timeout_s": 10}) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(5):
            live.is_usable(sid)
        left = staying(lambda: strays(live.sight.processes(container), PREBOOT))
        check(not left, f"{len(left)} processes are left")
        scratch_is_swept(live, container)


def scratch_is_swept(live: Live, container: str) -> None:
    """Check that no directory of an execution that is over, or never began, is kept."""
    sight = live.sight
    assert isinstance(sight, DockerSight)

    def count() -> int:
        call = sight.api.exec_create(container, ["ls", "/scratch"])["Id"]
        return len(bytes(sight.api.exec_start(call)).split())

    until(lambda: count() <= SCRATCH_ENTRIES, 20, "directories are left in /scratch")


def shadowed_modules(live: Live, short: bool) -> None:
    """No module of the workspace is run by a sandbox that waits: it has no timeout, and no limits yet."""
    with live.session() as sid:
        live.execute(sid, SHADOW)
        for _ in range(2 + PREBOOT):
            told = live.execute(sid, "pass")
            check(
                told["outcome"] == "ok", f"a script that imports nothing ended as {told['outcome']}: {told['stderr']}"
            )
        time.sleep(0.5)
        ran = live.execute(sid, WHICH_RAN)["stdout"]
        check(ran == "[]\n", f"run before their time: {ran}")


def raising_child(live: Live, short: bool) -> None:
    """What a forked child raises is not taken for the result of its parent."""
    with live.session() as sid:
        told = live.execute(sid, CHILD_RAISES)
        check((told["outcome"], told["value"]) == ("ok", "of the parent"), f"it came to {told}")


def tiny_writes(live: Live, short: bool) -> None:
    """Output in single bytes, from several sessions, does not keep the service from its other work."""
    seconds = 3 if short else 10
    times: list[float] = []
    health: list[float] = []
    with live.session() as other:
        sids = [live.open() for _ in range(3)]
        code = TINY_WRITES.format(seconds=seconds)
        threads = [threading.Thread(target=live.execute, args=(sid, code), kwargs={"timeout_s": 30}) for sid in sids]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            live.is_usable(other)
            times.append(time.monotonic() - begun)
            begun = time.monotonic()
            live.client.get("/health")
            health.append(time.monotonic() - begun)
            time.sleep(0.02)
        for sid in sids:
            live.client.delete(f"/v1/sessions/{sid}")
    check(quantile(health, 0.9) < 0.25, f"/health took {quantile(health, 0.9):.2f} s (p90)")
    check(quantile(times, 0.5) < 1, f"another session waited {quantile(times, 0.5):.2f} s (p50)")


def beats_at_the_end(live: Live, short: bool) -> None:
    """A heartbeat that falls into a container's removal ends nothing else."""
    with serve(pool_size=2, heartbeat_seconds=0.01, heartbeat_misses=500) as own:
        for _ in range(15 if short else 60):
            with own.session() as sid:
                own.is_usable(sid)
        until(own.is_ready, 30, "the pool is not filled any more")


PLAYS: dict[str, Callable[[Live, bool], str | None]] = {
    "more-01": inodes_beside,
    "more-02": processes_beside,
    "more-03": shadowed_modules,
    "more-04": raising_child,
    "more-05": tiny_writes,
    "more-06": beats_at_the_end,
}
CASES = [
    Case(name, "beyond", "lifecycle", "python", {}, {"outcome": " ".join(str(play.__doc__).split())})
    for name, play in PLAYS.items()
]
