"""A load that gives every panel of the dashboard something to show: `python -m tests.load URL KEY INSTANCE SECONDS`.

Executions of every outcome, sessions that end in several ways, and containers that vanish.
"""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import docker
import docker.errors
import httpx

PAUSE_S = 0.05
CROWD = 3
# What is executed, and how often in a hundred.
ORDERS: list[tuple[int, dict[str, Any]]] = [
    (60, {"code": "def handler(event): return sum(range(event))", "event": 5_000}),
    (12, {"code": "import time\ndef handler(event): time.sleep(event)", "event": 0.1}),
    (12, {"command": "seq 1000 | wc -l"}),
    (8, {"code": "def handler(event): return 1 / 0"}),
    (3, {"code": "while True: pass", "timeout_s": 0.2}),
    (3, {"code": "print('x' * (17 << 20))"}),
    (2, {"command": "exit 3"}),
    (5, {"code": "import urllib.request\nurllib.request.urlopen('http://10.0.0.1/', timeout=5)"}),  # refused
]


def load(url: str, key: str, instance: str, seconds: float, *, calm_s: float) -> int:
    """Load a service on the real engine for a time, with trouble every `calm_s`; return how many executions were answered."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(keepalive_expiry=2.0)  # shorter than the service's own
    headers = {"Authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=url, timeout=60, trust_env=False, headers=headers, limits=limits) as client,
        ThreadPoolExecutor() as lanes,
    ):
        runs = [lanes.submit(converse, client, until) for _ in range(2)]
        disturb(client, instance, until, calm_s)
        return sum(run.result() for run in runs)


def converse(client: httpx.Client, until: float) -> int:
    """Start sessions, execute in them, end most of them: the others fall idle."""
    weights, orders = zip(*ORDERS, strict=True)
    answered = 0
    while time.monotonic() < until:
        created = client.post("/v1/sessions", json={})
        if created.status_code == 201:
            path = created.headers["Location"]
            for order in random.choices(orders, weights, k=random.randint(4, 12)):
                answered += client.post(f"{path}/executions", json=order).is_success
                time.sleep(random.uniform(0, PAUSE_S))
            if random.random() < 0.8:
                client.delete(path)
        answered += client.post("/v1/execute", json=orders[0]).is_success
        time.sleep(PAUSE_S)
    return answered


def disturb(client: httpx.Client, instance: str, until: float, calm_s: float) -> None:
    """Every now and then start more sessions than are ready, and remove a container behind the service's back."""
    engine = docker.from_env()
    while time.monotonic() < until:
        created = [client.post("/v1/sessions", json={}) for _ in range(CROWD)]
        paths = [answer.headers["Location"] for answer in created if answer.status_code == 201]
        labels = [f"sandbox.instance={instance}", "sandbox.template"]
        containers = engine.containers.list(filters={"label": labels}, ignore_removed=True)
        if containers:
            with suppress(docker.errors.APIError):  # the service was just removing this one itself
                random.choice(containers).remove(force=True)
        for path in paths:
            client.post(f"{path}/executions", json={"command": "true"})
            client.delete(path)
        time.sleep(calm_s)
    engine.close()


if __name__ == "__main__":
    url, key, instance, seconds = sys.argv[1:]
    print(load(url, key, instance, float(seconds), calm_s=40.0), "executions were answered")
