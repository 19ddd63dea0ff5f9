"""Code cases: hostile code as an execution of a session, judged by what came back and what is left."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.attack.after import Scene, quantile, watched
from tests.attack.cases import Case, NotApplicable, check
from tests.attack.live import Json, Live

STALL_S = 0.25  # the case's 50 ms, on a machine that others use at the same time
# What only a container can do: the local engine has no memory cgroup, no quota on files, no filter of its own.
NEEDS_CONTAINER = {
    "priv-01": "a second seccomp filter is the container's",
    "mem-02": "without a memory cgroup it would take the host's memory",
    "mem-04": "without a memory cgroup it would take the host's memory",
    "mem-05": "without a memory cgroup it would take the host's memory",
    "mem-07": "without a memory cgroup only the stack's limit ends it",
    "mem-10": "the quota on inodes is the container's tmpfs",
    "disk-01": "the quota on files is the container's tmpfs",
    "disk-02": "the quota on files is the container's tmpfs",
    "disk-05": "the quota on inodes is the container's tmpfs",
}


def run(live: Live, case: Case) -> None:
    """Execute the case's code; raise Failed with all that is not as the case expects."""
    if live.engine == "local" and case.id in NEEDS_CONTAINER:
        raise NotApplicable(f"needs a container: {NEEDS_CONTAINER[case.id]}")
    with live.session() as sid:
        scene = Scene(live, sid, case)
        with watched(scene), AROUND.get(case.id, nothing)(live):
            begun = time.monotonic()
            execution = scene.execution = live.execute(sid, case.payload, timeout_s=case.allowed_s)
            wall_s = time.monotonic() - begun
            wrong = complaints(case, execution, wall_s)
            check(not wrong, "; ".join(wrong))


def complaints(case: Case, execution: Json, wall_s: float) -> list[str]:
    """Return what of an execution is not as the case expects; empty when all is."""
    expect, wrong = case.expect, []
    told = f"{execution['error']} {(execution['stdout'] + execution['stderr'])[-300:]!r}"
    if execution["outcome"] not in expect["status"].split("|"):
        wrong.append(f"outcome {execution['outcome']} instead of {expect['status']}: {told}")
    wrong += [f"stdout lacks {text!r}: {told}" for text in expect["stdout_contains"] if text not in execution["stdout"]]
    wrong += [f"stdout has {text!r}: {told}" for text in expect["stdout_not_contains"] if text in execution["stdout"]]
    codes = expect.get("exit_code", execution["exit_code"])
    if execution["exit_code"] not in (codes if isinstance(codes, list) else [codes]):
        wrong.append(f"exit code {execution['exit_code']} instead of {codes}")
    if "result" in expect and execution["value"] != expect["result"]:
        wrong.append(f"value {execution['value']} instead of {expect['result']}")
    if expect.get("result_absent") and execution["value"] is not None:
        wrong.append(f"a value came back: {str(execution['value'])[:100]}")
    if wall_s > expect.get("max_wall_s", wall_s):
        wrong.append(f"took {wall_s:.1f} s instead of {expect['max_wall_s']} s")
    if (promise := PROMISES.get(case.id)) is not None and not promise[1](execution):
        wrong.append(f"{promise[0]}: {told}")
    return wrong


# What a case's note says and its other fields do not.
PROMISES: dict[str, tuple[str, Callable[[Json], Any]]] = {
    "mem-08": ("no traceback of a MemoryError", lambda told: "MemoryError" in told["stderr"]),
    "out-04": (
        "the bytes did not survive",
        lambda told: (
            told["stdout"] == b"\xff\xfe\x00\x80 bad utf8 \xed\xa0\x80 \x1b[31m\r\n\x07".decode(errors="replace")
            and told["replaced"] == ["stdout"]
        ),
    ),
    "out-08": ("no error that tells why", lambda told: (told["error"] or {}).get("type", "").startswith("Runtime.")),
    "out-10": ("no error that tells why", lambda told: (told["error"] or {}).get("type", "").startswith("Runtime.")),
    "proc-10": ("signal 9 is not told", lambda told: told["signal"] == 9),
}


@contextmanager
def nothing(live: Live) -> Iterator[None]:
    """Surround an attack with nothing."""
    yield


@contextmanager
def without_a_stall(live: Live) -> Iterator[None]:
    """Check that the service goes on answering others while the attack's result is read."""
    times: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            begun = time.monotonic()
            live.client.get("/health")
            times.append(time.monotonic() - begun)
            time.sleep(0.005)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    check(quantile(times, 0.95) < STALL_S, f"the service stood still for {max(times):.3f} s")


@contextmanager
def beside_itself(live: Live) -> Iterator[None]:
    """Hold the attack's port in another session meanwhile: two sessions never share a loopback."""
    hold = (
        "import socket,time\ns=socket.socket(); s.bind(('127.0.0.1',8099)); s.listen(); time.sleep(1.5); print('held')"
    )
    with live.session() as sid:
        told: list[Json] = []
        thread = threading.Thread(target=lambda: told.append(live.execute(sid, hold)))
        thread.start()
        time.sleep(0.3)
        try:
            yield
        finally:
            thread.join()
    check(told and told[0]["stdout"] == "held\n", f"another session could not hold the same port: {told}")


AROUND = {"out-11": without_a_stall, "net-05": beside_itself}
