"""What attacks.json does not have of the engine and the crowd: each prints its figure."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.attack import engine_gone
from tests.attack.after import quantile
from tests.attack.cases import Case, check
from tests.attack.clock import clock_jumps
from tests.attack.engine_away import RECOVERY_S, behind_a_proxy, owned, settles
from tests.attack.live import Live, bearer, serve, until

CROWD = 500
CAP = 6


def quarantine(live: Live, short: bool) -> str:
    """An engine refuses to remove a container: it is shown, counts, others are served, and in the end it is gone."""
    with behind_a_proxy(pool_size=1, max_containers=4) as (own, proxy):
        sid = own.open()
        until(own.is_ready, RECOVERY_S, "the pool is not full")
        proxy.refusing = True
        check(own.client.delete(f"/v1/sessions/{sid}").status_code == 204, "the session could not be ended")
        begun = time.monotonic()
        shown = "the container is not in quarantine"
        until(lambda: own.client.get("/v1/pool").json()["quarantined"], 30, shown)
        took_s = time.monotonic() - begun
        check(own.metric("sandbox_quarantined") == 1, "the metric does not count it")
        check(len(own.sight.containers()) == owned(own) + 1, "it is not all that is left")
        check(own.is_ready(), "one container in quarantine keeps the service from its work")
        with own.session() as other:
            own.is_usable(other)
        proxy.refusing = False
        begun = time.monotonic()
        until(lambda: own.metric("sandbox_quarantined") == 0, 60, "it stays in quarantine")
        until(lambda: len(own.sight.containers()) == owned(own), 30, "containers are left")
        gone_s = time.monotonic() - begun
    return f"in quarantine after {took_s:.1f} s, all gone {gone_s:.1f} s after the engine gave in"


def crowd(live: Live, short: bool) -> str:
    """Five hundred ask for a session at once: never more containers than allowed, each gets an answer, in bounded time."""
    with serve(pool_size=2, max_containers=CAP, acquire_timeout_seconds=20, max_waiting=64) as own:
        until(own.is_ready, RECOVERY_S, "the pool is not full")
        answers: list[httpx.Response | httpx.HTTPError] = []
        times: list[float] = []
        most = 0
        barrier = threading.Barrier(CROWD + 1)

        def ask() -> None:
            with httpx.Client(base_url=own.client.base_url, headers=bearer(own.key), trust_env=False) as client:
                barrier.wait()
                begun = time.monotonic()
                try:
                    answers.append(client.post("/v1/sessions", json={}, timeout=60))
                except httpx.HTTPError as error:
                    answers.append(error)
                times.append(time.monotonic() - begun)

        threads = [threading.Thread(target=ask) for _ in range(CROWD)]
        for thread in threads:
            thread.start()
        barrier.wait()
        while any(thread.is_alive() for thread in threads):
            most = max(most, len(own.sight.containers()))
            time.sleep(0.05)
        statuses = Counter(
            str(answer.status_code) if isinstance(answer, httpx.Response) else "cut" for answer in answers
        )
        check(most <= CAP, f"{most} containers existed at once, {CAP} are allowed")
        check(statuses["201"] == CAP, f"{statuses['201']} sessions were given, {CAP} are allowed: {statuses}")
        check(set(statuses) <= {"201", "429", "503"}, f"answers: {statuses}")
        refused = [one for one in answers if isinstance(one, httpx.Response) and one.status_code != 201]
        check(all("retry-after" in answer.headers for answer in refused), "a refusal has no Retry-After")
        for session in own.client.get("/v1/sessions").json()["sessions"]:
            own.client.delete(f"/v1/sessions/{session['id']}")
        settles(own, orphans=False)
    return f"{dict(statuses)}, at most {most} containers, slowest answer {max(times):.1f} s"


def in_order(live: Live, short: bool) -> str:
    """Who came first is served first, whoever else comes meanwhile."""
    with serve(pool_size=0, max_containers=1 + 4, acquire_timeout_seconds=60) as own:
        held = [own.open() for _ in range(5)]
        served: list[int] = []
        refusals: list[Any] = []

        def ask(number: int) -> None:
            answer = own.client.post("/v1/sessions", json={"id": f"n{number}"}, timeout=60)
            (served if answer.status_code == 201 else refusals).append(number)

        threads = []
        for number, sid in enumerate(held):  # each end makes room for one more, who waits for its container to start
            own.client.delete(f"/v1/sessions/{sid}")
            thread = threading.Thread(target=ask, args=(number,))
            thread.start()
            threads.append(thread)
            time.sleep(0.03)
        for thread in threads:
            thread.join()
    check(not refusals, f"refused: {refusals}")
    check(served == sorted(served), f"served in the order {served}")
    return f"served in the order {served}"


def neighbours(live: Live, short: bool) -> str:
    """Sessions that end and begin all the time do not starve one that only executes."""
    times: list[float] = []
    over = threading.Event()
    with serve(pool_size=2) as own, own.session() as quiet:

        def churn() -> None:
            with httpx.Client(base_url=own.client.base_url, headers=bearer(own.key), trust_env=False) as client:
                while not over.is_set():
                    answer = client.post("/v1/sessions", json={}, timeout=60)
                    if answer.status_code == 201:
                        client.delete(answer.headers["location"], timeout=60)

        threads = [threading.Thread(target=churn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(30 if short else 200):
            begun = time.monotonic()
            own.is_usable(quiet)
            times.append(time.monotonic() - begun)
        over.set()
        for thread in threads:
            thread.join()
    late = quantile(times, 0.99)
    check(late < 1, f"p99 {late:.2f} s beside sessions that come and go")
    return f"p50 {quantile(times, 0.5) * 1000:.0f} ms, p99 {late * 1000:.0f} ms"


PLAYS: dict[str, Callable[[Live, bool], str | None]] = {
    "life-05": engine_gone.stopped,
    "life-06": engine_gone.restored,
    "life-11": clock_jumps,
    "chaos-01": engine_gone.crashed,
    "chaos-02": engine_gone.frozen,
    "chaos-03": quarantine,
    "chaos-04": crowd,
    "chaos-05": in_order,
    "chaos-06": neighbours,
}
CASES = [
    Case(name, "chaos", "lifecycle", None, {}, {"outcome": " ".join(str(play.__doc__).split())})
    for name, play in PLAYS.items()
    if name.startswith("chaos")
]
