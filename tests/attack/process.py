"""The service's own end and start: killed, ended, started twice."""

import contextlib
import shutil
import signal
import threading
import time
from typing import Any

import httpx

from tests.attack.cases import check
from tests.attack.live import Live, serve, until

RESTART_S = 10.0
REMOVAL_S = 30.0
SLEEPER = "import time; open('/workspace/kept','a').write('x'); time.sleep({seconds}); print('slept')"


def in_background(live: Live, sid: str, code: str, answers: list[Any]) -> threading.Thread:
    """Send an execution from a thread; what comes of it is appended to the answers."""

    def send() -> None:
        body = {"code": code, "timeout_s": 100}
        try:
            answers.append(live.client.post(f"/v1/sessions/{sid}/executions", json=body, timeout=120))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def until_running(live: Live, count: int) -> None:
    """Wait until so many executions run."""
    until(lambda: live.metric("sandbox_executions_in_flight") >= count, 10, f"{count} executions did not start")
    time.sleep(0.3)


def killed(live: Live, short: bool) -> str:
    """life-01: the service is killed in the middle of an execution and started again."""
    with serve(pool_size=1) as own:
        sid = own.open(metadata={"kept": "yes"})
        answers: list[Any] = []
        thread = in_background(own, sid, SLEEPER.format(seconds=10), answers)
        until_running(own, 1)
        time.sleep(1.5)
        own.signal(signal.SIGKILL)
        own.process.wait()
        thread.join()
        begun = time.monotonic()
        own.start(ready=False)
        listed = f"/v1/sessions/{sid}"
        until(lambda: own.client.get(listed).status_code == 200, RESTART_S, "the session is not listed again")
        back_s = time.monotonic() - begun
        check(own.client.get(listed).json()["metadata"] == {"kept": "yes"}, "the metadata is lost")
        until(lambda: not is_running(own, sid), 30, "the execution does not end")
        ended = own.client.get(f"{listed}/executions").json()["executions"][-1]
        told = (ended["outcome"], ended["stdout"])
        check(told in (("ok", "slept\n"), ("cancelled", "")), f"the execution came to {told}")
        kept = own.execute(sid, "print(open('/workspace/kept').read())")
        check(kept["stdout"] == "x\n", f"the workspace, or how often it ran: {kept['stdout']!r}")
        until(own.is_ready, RESTART_S, "the pool is not full again")
        size = 1 + int(own.pool()["target"])
        until(lambda: len(own.sight.containers()) == size, REMOVAL_S, "containers without an owner are left")
    return f"the session was listed again after {back_s:.1f} s, its execution came to {told[0]}; lost: nothing"


def is_running(live: Live, sid: str) -> bool:
    """Tell whether the session's last execution runs."""
    executions = live.client.get(f"/v1/sessions/{sid}/executions").json()["executions"]
    return not executions or executions[-1]["outcome"] is None


def twice(live: Live, short: bool) -> str:
    """life-13: a second service of the same instance harms nothing of the first."""
    with serve(pool_size=1) as own, own.session() as sid:
        own.is_usable(sid)
        containers = set(own.sight.containers())
        second = Live("docker", {"instance": own.instance, "state_dir": own.settings["state_dir"], "pool_size": 1}, {})
        refused(second, own.instance)
        check(set(own.sight.containers()) >= containers, "the second service removed containers of the first")
        own.is_usable(sid)
        elsewhere = Live("docker", {"instance": own.instance, "pool_size": 1}, {})  # as on another machine
        refused(elsewhere, own.instance)
        check(set(own.sight.containers()) >= containers, "a service elsewhere removed containers of the first")
        own.is_usable(sid)
        own.signal(signal.SIGKILL)
        own.process.wait()
        begun = time.monotonic()
        own.start(ready=False)  # its dead self does not hold it up
        own.is_usable(sid)
        took_s = time.monotonic() - begun
        check(
            took_s < (3 * RESTART_S if short else RESTART_S), f"after a kill the session was back after {took_s:.1f} s"
        )
    return f"refused twice; after a kill the session was back after {took_s:.1f} s"


def refused(second: Live, instance: str) -> None:
    """Start a service that is to refuse, and say why; end it when it does not."""
    with contextlib.suppress(AssertionError):
        second.start(ready=False)
    time.sleep(1)
    code = second.process.poll()
    text = second.log.read_text()
    if code is None:
        second.process.kill()  # an ordinary end would remove the first one's containers
        second.process.wait()
    second.client.close()
    shutil.rmtree(second.folder)  # not `close`: it would remove the first one's containers
    check(code is not None, "a second service of the same instance runs")
    check(code != 0 and instance in text, f"the second service ended with {code} and said {text[-200:]!r}")


def terminated(live: Live, short: bool) -> None:
    """life-15: SIGTERM with five executions: those that end in time end well, the others are cancelled."""
    for seconds, drain_s in ((2, 10), (60, 1)):
        with serve(pool_size=2, drain_seconds=drain_s) as own:
            sids = [own.open(), own.open()]
            answers: list[Any] = []
            code = SLEEPER.format(seconds=seconds)
            threads = [in_background(own, sids[number % 2], code, answers) for number in range(5)]
            until_running(own, 5)
            begun = time.monotonic()
            own.signal(signal.SIGTERM)
            time.sleep(0.3)
            accepted = accepts(own)
            exit_code = own.end()
            took_s = time.monotonic() - begun
            for thread in threads:
                thread.join()
            about = f"executions of {seconds} s, {drain_s} s to drain"
            check(not accepted, f"{about}: a new session was accepted while ending")
            check(exit_code == 0, f"{about}: exit code {exit_code}")
            check(took_s < drain_s + 20, f"{about}: the end took {took_s:.1f} s")
            check(not own.sight.containers(), f"{about}: containers are left: {own.sight.containers()}")
            if seconds < drain_s:
                told = [answer.json()["stdout"] if isinstance(answer, httpx.Response) else answer for answer in answers]
                check(told == ["slept\n"] * 5, f"{about}: {told}")
            else:
                told = [short_of(answer) for answer in answers]
                check(set(told) <= {"cancelled", "closed"}, f"{about}: {told}")
    kept()


def kept() -> None:
    """Unless told otherwise the end leaves the sessions and nothing else, and the next start finds them."""
    with serve(pool_size=1, on_exit=None) as own:
        sid = own.open()
        own.execute(sid, "open('/workspace/kept','w').write('x')")
        check(own.end() == 0, "by default: the exit code is not 0")
        left = len(own.sight.containers())
        check(left == 1, f"by default: {left} containers are left for one session")
        own.start()
        told = own.execute(sid, "print(open('/workspace/kept').read())")
        check(told["stdout"] == "x\n", "by default: the workspace is lost")


def short_of(answer: object) -> str:
    """Return what became of a request: an outcome, a status, or that its connection was closed."""
    if not isinstance(answer, httpx.Response):
        return "closed"
    return str(answer.json()["outcome"]) if answer.status_code == 200 else f"{answer.status_code} {answer.text[:80]}"


def accepts(live: Live) -> bool:
    """Tell whether a session can still be started."""
    try:
        return (
            httpx.post(
                f"http://127.0.0.1:{live.port}/v1/sessions", json={}, headers=dict(live.client.headers), trust_env=False
            ).status_code
            == 201
        )
    except httpx.HTTPError:
        return False
