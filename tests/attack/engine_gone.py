"""The engine itself stopped, killed and frozen: a real dockerd of our own."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.attack.after import quantile
from tests.attack.cases import check
from tests.attack.dockerd import Dockerd, dockerd
from tests.attack.engine_away import HEALTH_S, RECOVERY_S, reasons, settles
from tests.attack.live import Live, serve, until
from tests.attack.process import in_background, until_running

NOTICED_S = 10.0  # until /ready tells
REFUSAL_S = 10.0
TICKS = "import time\nfor n in range({seconds}): print(n, flush=True); time.sleep(1)"
PATIENCE: dict[str, Any] = {"engine_timeout_seconds": 3, "acquire_timeout_seconds": 3, "pool_size": 2}


@contextmanager
def healthy(live: Live, *, share: float) -> Iterator[None]:
    """Check that /health is answered all the time, and this share of the answers at once."""
    times: list[float] = []
    over = threading.Event()

    def look() -> None:
        with httpx.Client(base_url=live.client.base_url, trust_env=False, timeout=5) as client:
            while not over.is_set():
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                times.append(time.monotonic() - begun)
                over.wait(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    late = quantile(times, share)
    check(late < HEALTH_S, f"/health took {late:.3f} s (p{100 * share:.0f} of {len(times)})")


def away(
    short: bool, leave: Callable[[Dockerd], object], come_back: Callable[[Dockerd], object], *, live_restore: bool
) -> str:
    """Take the engine away under a running execution, and bring it back; return what was found."""
    away_s = 4 if short else 20
    with (
        dockerd(live_restore=live_restore) as engine,
        serve(environ={"DOCKER_HOST": engine.address}, **PATIENCE) as own,
    ):
        sid = own.open(metadata={"kept": "yes"})
        own.execute(sid, "open('/workspace/kept','w').write('x')")
        until(own.is_ready, RECOVERY_S, "the pool is not full")
        answers: list[Any] = []
        runner = in_background(own, sid, TICKS.format(seconds=away_s + 3), answers)
        until_running(own, 1)
        with healthy(own, share=0.9 if short else 0.99):  # `make test` shares its machine
            begun = time.monotonic()
            leave(engine)
            noticed_s = until(lambda: reasons(own), NOTICED_S, "the service stays ready")
            refused_s = refusal(own)
            time.sleep(max(0.0, away_s - (time.monotonic() - begun)))
            check(reasons(own), "the service says that it is ready")
            told = reasons(own)
            come_back(engine)
            back = time.monotonic()
            until(own.is_ready, RECOVERY_S, "the pool is not full again")
            recovered_s = time.monotonic() - back
        runner.join()
        lost = survives(own, sid, answers, away_s) if live_restore else is_lost(own, sid, answers)
        settles(own, orphans=False)
        until(lambda: len(own.sight.containers()) == containers_held(own), RECOVERY_S, "containers without an owner")
        check(not own.events("request_failed"), "a request failed inside the service")
    return (
        f"away {away_s} s: noticed after {noticed_s:.1f} s ({told[:60]}), refused in {refused_s:.1f} s, "
        f"pool full {recovered_s:.1f} s after its return; lost: {lost}"
    )


def containers_held(live: Live) -> int:
    """Return how many containers sessions and pool hold."""
    pool = live.pool()
    return len(live.client.get("/v1/sessions").json()["sessions"]) + int(pool["ready"]) + int(pool["starting"])


def refusal(live: Live) -> float:
    """Check that a new session is refused in time and may be asked for again; return how long that took."""
    begun = time.monotonic()
    answer = live.client.post("/v1/sessions", json={})
    took_s = time.monotonic() - begun
    check(answer.status_code == 503, f"without an engine a session was answered {answer.status_code}")
    check("retry-after" in answer.headers, "the refusal has no Retry-After")
    check(took_s < REFUSAL_S, f"the refusal took {took_s:.1f} s")
    return took_s


def survives(live: Live, sid: str, answers: list[Any], away_s: int) -> str:
    """Check that the session is what it was, and that the execution went on."""
    session = live.client.get(f"/v1/sessions/{sid}")
    check(session.status_code == 200, f"the session is gone: {session.text[:200]}")
    check(session.json()["metadata"] == {"kept": "yes"}, "its metadata is lost")
    check(isinstance(answers[0], httpx.Response) and answers[0].status_code == 200, f"the execution: {answers[0]}")
    execution = answers[0].json()
    ticks = "".join(f"{number}\n" for number in range(away_s + 3))
    check(execution["outcome"] == "ok", f"the execution ended as {execution['outcome']}: {execution['error']}")
    check(execution["stdout"] == ticks, f"its output is {execution['stdout']!r}")
    told = live.execute(sid, "print(open('/workspace/kept').read())")
    check(told["stdout"] == "x\n", f"the workspace: {told['stdout']!r}")
    return "nothing"


def is_lost(live: Live, sid: str, answers: list[Any]) -> str:
    """Check that session and execution are lost, and say so, for their container is gone."""
    answer = live.client.get(f"/v1/sessions/{sid}")
    check(answer.status_code == 410, f"a session without a container is answered {answer.status_code}")
    check(isinstance(answers[0], httpx.Response), f"the execution: {answers[0]}")
    outcome = answers[0].json()["outcome"]
    check(outcome in ("lost", "killed"), f"the execution ended as {outcome}")
    return f"1 session (its execution: {outcome}), as its container"


def stopped(live: Live, short: bool) -> str:
    """life-05: dockerd is stopped, and its containers with it."""
    return away(short, Dockerd.stop, Dockerd.start, live_restore=False)


def restored(live: Live, short: bool) -> str:
    """life-06: dockerd is stopped, its containers live on."""
    return away(short, Dockerd.stop, Dockerd.start, live_restore=True)


def crashed(live: Live, short: bool) -> str:
    """Dockerd is killed, its containers live on."""
    return away(short, Dockerd.kill, Dockerd.start, live_restore=True)


def frozen(live: Live, short: bool) -> str:
    """Dockerd accepts every call and answers none, and its attached streams stand still; then it goes on."""
    return away(short, Dockerd.freeze, Dockerd.thaw, live_restore=True)
