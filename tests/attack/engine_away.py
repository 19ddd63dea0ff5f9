"""The engine in trouble, played by a proxy in front of it: hanging, full, cut off, without the image."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker.errors
import httpx

from orchestrator.reconciler import ORPHAN_AGE_S
from tests.attack.after import quantile
from tests.attack.cases import Failed, check
from tests.attack.live import Live, serve, until
from tests.attack.proxy import Proxy, proxied
from tests.attack.sight import DockerSight
from tests.live import IMAGE

HEALTH_S = 0.1
CREATES_A_MINUTE = 10
RECOVERY_S = 60.0
ORPHAN_S = ORPHAN_AGE_S + 20


@contextmanager
def behind_a_proxy(**settings: Any) -> Iterator[tuple[Live, Proxy]]:
    """Run a service whose engine is the proxy."""
    patience: dict[str, Any] = {
        "engine_timeout_seconds": 2,
        "start_timeout_seconds": 10,
        "acquire_timeout_seconds": 3,
    }
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-attack-") as folder,
        proxied(Path(folder)) as proxy,
        serve(environ={"DOCKER_HOST": f"unix://{proxy.path}"}, **(patience | settings)) as live,
    ):
        try:
            yield live, proxy
        finally:
            proxy.hanging = proxy.cutting = proxy.full = proxy.refusing = False


def refused(live: Live) -> httpx.Response:
    """Ask for sessions until none is left; return the refusal, which must be one in time."""
    for _ in range(5):
        begun = time.monotonic()
        answer = live.client.post("/v1/sessions", json={})
        took_s = time.monotonic() - begun
        if answer.status_code != 201:
            check(answer.status_code == 503, f"without an engine a session was answered {answer.status_code}")
            check("retry-after" in answer.headers, "the refusal has no Retry-After")
            check(took_s < 10, f"the refusal took {took_s:.1f} s")
            return answer
    raise Failed("sessions are started although the engine makes no containers")


def reasons(live: Live) -> str:
    """Return why the service is not ready; empty when it is."""
    answer = live.client.get("/ready")
    return "" if answer.status_code == 200 else "; ".join(answer.json()["reasons"])


def owned(live: Live) -> int:
    """Return how many containers sessions and pool hold."""
    pool = live.pool()
    return len(live.client.get("/v1/sessions").json()["sessions"]) + int(pool["ready"]) + int(pool["starting"])


def settles(live: Live, *, orphans: bool = True) -> str:
    """Wait until the pool is full again and every container has its owner; return how long that took."""
    took_s = until(live.is_ready, RECOVERY_S, "the pool is not full again")
    if orphans:
        found = live.sight.containers
        took_s += until(lambda: len(found()) == owned(live), ORPHAN_S, "containers without an owner are left")
    size = int(live.pool()["target"])
    for _ in range(20):
        check(live.pool()["ready"] <= size, "the pool is filled above its size")
        time.sleep(0.1)
    return f"all as before after {took_s:.1f} s"


def hanging(live: Live, short: bool) -> str:
    """life-07: an engine that accepts calls and never answers."""
    with behind_a_proxy(pool_size=1) as (own, proxy):
        sid = own.open()
        until(own.is_ready, RECOVERY_S, "the pool is not full")
        proxy.hanging = True
        times: list[float] = []
        begun = time.monotonic()
        asked = threading.Thread(target=lambda: until(lambda: reasons(own), 20, "the service stays ready"))
        asked.start()
        while time.monotonic() - begun < (8 if short else 25):
            before = time.monotonic()
            check(own.client.get("/health").status_code == 200, "the service is not healthy")
            times.append(time.monotonic() - before)
            time.sleep(0.05)
        asked.join()
        check(reasons(own), "the service says that it is ready")
        own.is_usable(sid)
        refused(own)
        late = quantile(times, 0.99)
        check(late < HEALTH_S, f"/health took {late:.3f} s (p99 of {len(times)})")
        late_calls = sum(
            value
            for name, value in own.samples().items()
            if "engine_call_seconds_count" in name and 'result="timeout"' in name
        )
        check(late_calls > 0, "no call to the engine was given up")
        extra = own.client.get("/v1/sessions").json()["sessions"][-1]["id"]
        before = time.monotonic()
        check(own.client.delete(f"/v1/sessions/{extra}").status_code == 204, "a session could not be ended")
        check(time.monotonic() - before < 1, "the end of a session waits for the engine")
        proxy.hanging = False
        settled = settles(own, orphans=not short)  # what was created after all, when nobody waited any more
    return f"/health p99 {late * 1000:.0f} ms of {len(times)}; {settled}; lost: nothing"


def image_removed(live: Live, short: bool) -> str:
    """life-08: the image goes, and comes back."""
    sight = DockerSight("nobody")
    repository = f"sandbox-attack-{os.getpid()}"
    sight.api.tag(IMAGE, repository, "latest")
    try:
        with behind_a_proxy(image=f"{repository}:latest", pool_size=1) as (own, proxy):
            sid = own.open()
            until(own.is_ready, RECOVERY_S, "the pool is not full")
            sight.api.remove_image(f"{repository}:latest", noprune=True)
            told = refused(own).text + reasons(own)
            check("image" in told.lower(), f"nothing tells that the image is missing: {told}")
            own.is_usable(sid)
            loop = no_hot_loop(own, proxy, short)
            sight.api.tag(IMAGE, repository, "latest")
            settled = settles(own)
        return f"{loop}; {settled}; lost: nothing"
    finally:
        with suppress(docker.errors.ImageNotFound):
            sight.api.remove_image(f"{repository}:latest", noprune=True)
        sight.api.close()


def no_hot_loop(live: Live, proxy: Proxy, short: bool) -> str:
    """Check that failed starts pause, although sessions are asked for all the time; return how many there were."""
    since, begun = proxy.creates, time.monotonic()
    while time.monotonic() - begun < (15 if short else 60):
        refused(live)
    count = proxy.creates - since
    told = f"{count} create calls in {time.monotonic() - begun:.0f} s"
    check(count < CREATES_A_MINUTE, told)
    return told


def disk_full(live: Live, short: bool) -> str:
    """life-09: an engine whose disk is full refuses to create; what runs goes on."""
    with behind_a_proxy(pool_size=1) as (own, proxy):
        sid = own.open()
        until(own.is_ready, RECOVERY_S, "the pool is not full")
        proxy.full = True
        told = refused(own).text + reasons(own)
        check("no space left" in told, f"nothing tells that the disk is full: {told}")
        loop = no_hot_loop(own, proxy, short)
        own.is_usable(sid)
        check(len(own.sight.containers()) == owned(own), "half-made containers are left")
        proxy.full = False
        settled = settles(own)
    return f"{loop}; {settled}; lost: nothing"


def answer_lost(live: Live, short: bool) -> str:
    """life-12: the engine creates a container, but the answer is lost."""
    with behind_a_proxy(pool_size=2) as (own, proxy):
        for _ in range(1 if short else 3):
            until(own.is_ready, RECOVERY_S, "the pool is not full")
            before = proxy.creates
            proxy.cutting = True
            sid = own.open()
            until(lambda before=before: proxy.creates > before, 10, "nothing was created")  # type: ignore[misc]
            time.sleep(0.2)
            proxy.cutting = False
            own.is_usable(sid)
            settles(own)
            own.client.delete(f"/v1/sessions/{sid}")
        settled = settles(own)
    return f"{settled}; lost: nothing"
