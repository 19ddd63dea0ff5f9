"""What is not as it seems: agents that lie, a frame that was torn, hosts that cannot isolate."""

import asyncio
import io
import secrets
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker.errors
import httpx

from orchestrator import frames, settings
from orchestrator.channel import Channel
from orchestrator.engine.docker import DockerEngine
from orchestrator.frames import AnyAgentFrame, Hello, Output, Result
from orchestrator.greeting import AGENT_VERSION
from orchestrator.recipes import limits_of, recipes, spec_of
from tests.attack.after import quantile
from tests.attack.cases import Failed, check
from tests.attack.live import FIRST_UID, Live, serve, until
from tests.attack.sight import DockerSight
from tests.live import IMAGE

HERE = Path(__file__).parent
AGENT = "/opt/sandbox/agent/__main__.py"
BWRAP = "/usr/bin/bwrap"
RSS_SLACK = 64 << 20
GRACE_S = 1
REMOVAL_S = 30.0
# What the lie comes to: the execution is lost, unless an honest result came first.
LIES = {
    "endless": "lost",
    "unknown type": "lost",
    "no type": "lost",
    "wrong id": "lost",
    "result twice": "ok",
    "output after result": "ok",
    "output out of order": "lost",
    "too much output": "lost",
    "invalid utf-8": "lost",
    "tiny frames": "lost",
    "empty lines": "ok",
    "many pongs": "ok|lost",
    "deep": "lost",
    "huge number": "lost",
    "odd result": "lost",
    "no number": "lost",
    "second hello": "lost",
    "forged log": "lost",
    "noise on stderr": "ok",
    "nothing": "lost",
}
SURVIVES = {"empty lines", "many pongs", "noise on stderr"}  # odd, but no lie: the container may stay
NO_NAMESPACE = """#!/bin/sh
cat <&5 >/dev/null; cat <&6 >/dev/null
echo "bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user \
namespaces. On e.g. debian this can be enabled with 'sysctl kernel.unprivileged_userns_clone=1'." >&2
exit 1
"""
DENIED_MAP = """#!/bin/sh
cat <&5 >/dev/null; cat <&6 >/dev/null
echo "bwrap: setting up uid map: Permission denied" >&2
exit 1
"""
DENIED_MOUNT = """#!/bin/sh
cat <&5 >/dev/null; cat <&6 >/dev/null
echo "bwrap: Failed to make / slave: Permission denied" >&2
exit 1
"""


@contextmanager
def changed_image(path: str, content: bytes, *, mode: int) -> Iterator[str]:
    """Make an image that is ours but for one file; yield its tag."""
    sight = DockerSight("nobody")
    tag = f"sandbox-attack-{secrets.token_hex(4)}:latest"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        # The image carries bytecode, which would be preferred to another source beside it.
        dockerfile = f"FROM {IMAGE}\nRUN rm -rf /opt/sandbox/agent/__pycache__\nCOPY changed {path}\n".encode()
        for name, data in (("Dockerfile", dockerfile), ("changed", content)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    packed.seek(0)
    events = list(sight.api.build(fileobj=packed, custom_context=True, tag=tag, rm=True, decode=True))
    check(not any("error" in event for event in events), f"the image was not built: {events[-1:]}")
    try:
        yield tag
    finally:
        with suppress(docker.errors.APIError):  # a container of it may just be being removed
            sight.api.remove_image(tag, force=True)
        sight.api.close()


# --- agents that lie


def lying_agents(live: Live, short: bool) -> None:
    """life-17."""
    with (
        changed_image(AGENT, (HERE / "liar.py").read_bytes(), mode=0o644) as tag,
        serve(pool_size=1, grace_seconds=GRACE_S, templates_file=templates(live, tag)) as own,
        own.session() as sid,
    ):
        for what, outcome in LIES.items():
            suffer(own, sid, what, outcome)
        astray(own)
        deaf(own)
        until(own.is_ready, REMOVAL_S, "the pools are not full again")
        check(not own.events("fake"), "an agent forged a log line")
        check(not own.events("request_failed"), "a request failed inside the service")


def templates(live: Live, tag: str) -> Path:
    """Write a templates file with the liars' template; return its path."""
    path = live.folder / "templates.toml"
    path.write_text(f'[liar]\nimage = "{tag}"\npool_size = 1\n')
    return path


def suffer(own: Live, other: str, what: str, outcome: str) -> None:
    """Hear one lie: only its own container ends, in time, and others are served meanwhile."""
    until(own.is_ready, REMOVAL_S, f"{what}: the pools are not full")
    own.forget_peak()
    before = own.memory()
    times: list[float] = []
    liar = own.open(template="liar")
    container = newest(own)
    told: list[str] = []

    def listen() -> None:
        told.append(str(own.execute(liar, what, timeout_s=2)["outcome"]))

    thread = threading.Thread(target=listen)
    thread.start()
    while thread.is_alive() or not times:  # a lie may be over before the first look
        begun = time.monotonic()
        own.is_usable(other)
        times.append(time.monotonic() - begun)
        time.sleep(0.02)
    check(told and told[0] in outcome.split("|"), f"{what}: the outcome is {told}")
    check(quantile(times, 0.9) < 1, f"{what}: another session waited {quantile(times, 0.9):.2f} s")
    if what not in SURVIVES:
        ended = f"/v1/sessions/{liar}"
        until(lambda: own.client.get(ended).status_code == 410, 5, f"{what}: the session goes on")
        until(lambda: container not in own.sight.containers(), REMOVAL_S, f"{what}: the container was not removed")
    own.client.delete(f"/v1/sessions/{liar}")
    grown = own.memory("VmHWM") - before
    check(grown < RSS_SLACK, f"{what}: the orchestrator grew by {grown >> 20} MiB")
    check(own.process.poll() is None, f"{what}: the service has ended")


def newest(own: Live) -> str:
    """Return the name of the liars' container that serves a session: the oldest of its template."""
    sight = own.sight
    assert isinstance(sight, DockerSight)
    found = sight.api.containers(filters={"label": [f"sandbox.instance={own.instance}", "sandbox.template=liar"]})
    return str(min(found, key=lambda item: item["Created"])["Names"][0].lstrip("/"))


def astray(own: Live) -> None:
    """An agent that says it is bound to another session serves none."""
    answer = own.client.post("/v1/sessions", json={"id": "astray", "template": "liar"})
    check(answer.status_code in (502, 503), f"an agent bound elsewhere was answered {answer.status_code}")
    check(own.client.get("/v1/sessions/astray").status_code == 404, "a session of an agent bound elsewhere exists")


def deaf(own: Live) -> None:
    """An agent that does not read holds a large job up only until its deadline."""
    sid = own.open(id="deaf", template="liar")
    begun = time.monotonic()
    told = own.execute(sid, "deaf#" + "x" * (4 << 20), timeout_s=1)
    check(told["outcome"] == "lost", f"deaf: the outcome is {told['outcome']}")
    check(time.monotonic() - begun < 1 + GRACE_S + 2, f"deaf: lost after {time.monotonic() - begun:.1f} s")


# --- a torn frame


def torn_frame(live: Live, short: bool) -> None:
    """life-18: the stream is cut in the middle of a frame to the agent; the next client is understood."""
    instance = f"{live.instance}-torn"
    given = {"SANDBOX_INSTANCE": instance, "SANDBOX_UID_BASE": str(FIRST_UID), "SANDBOX_IMAGE": IMAGE}
    chosen = settings.load(given)
    try:
        asyncio.run(tear(chosen))
    finally:
        DockerSight(instance).clear()


class Ear:
    """A channel whose frames are kept, and can be waited for."""

    def __init__(self) -> None:
        self.heard: list[AnyAgentFrame] = []
        self.channel = Channel(self.heard.append, lambda reason: None)

    async def until(self, kind: type[AnyAgentFrame]) -> AnyAgentFrame:
        """Wait for a frame of a kind."""
        for _ in range(400):
            for frame in self.heard:
                if isinstance(frame, kind):
                    return frame
            await asyncio.sleep(0.05)
        raise Failed(f"no {kind.__name__} came: {self.heard}")


async def tear(chosen: settings.Settings) -> None:
    """Start a container, cut its stream at every kind of place, attach again."""
    recipe = next(iter(recipes(chosen).values()))
    engine = DockerEngine(chosen.instance, timeout_s=15, record=lambda _call, _result, _seconds: None)
    spec = spec_of(chosen, recipe, uid=FIRST_UID)
    ear = Ear()
    limits = limits_of(chosen, recipe)
    wire = await engine.start(spec, ear.channel)
    ear.channel.open(wire)
    ear.channel.send(frames.encode("hello", version=AGENT_VERSION, nonce="0", limits=limits))
    await ear.until(Hello)
    job = {"code": "import time\nfor n in range(4): print(n); time.sleep(0.5)", "timeout_s": 30.0}
    ear.channel.send(frames.encode("execute", id="e1", job=job))
    await ear.until(Output)
    for number, torn in enumerate((b'{"type":"pi', b'{"type":"cancel","id":"e1"', b"x" * 100_000, b'"', b"\xff")):
        wire.write(torn)
        await wire.drain()
        await asyncio.sleep(0.1)
        ear.channel.close()
        ear = Ear()
        wire = await engine.attach(spec.name, ear.channel)
        ear.channel.open(wire)
        ear.channel.send(frames.encode("hello", version=AGENT_VERSION, nonce=str(number + 1), limits=limits))
        hello = await ear.until(Hello)
        assert isinstance(hello, Hello)
        check(hello.nonce == str(number + 1), "the agent answered another client")
        check([known.id for known in hello.executions] == ["e1"], f"the agent holds {hello.executions}")
    ear.channel.send(frames.encode("resync", id="e1", seq=0))
    result = await ear.until(Result)
    assert isinstance(result, Result)
    check(result.outcome == "ok", f"the execution ended as {result.outcome}")
    text = b"".join({frame.seq: frame.data for frame in ear.heard if isinstance(frame, Output)}.values())
    check(text == b"0\n1\n2\n3\n", f"after the last attach its output was {text!r}")
    ear.channel.close()
    await engine.remove(spec.name)
    await engine.close()


# --- hosts that cannot isolate


def unsafe_hosts(live: Live, short: bool) -> None:
    """life-22: a host that cannot isolate serves nothing, and says which setting is missing."""
    bare = "#!/usr/bin/python3 -IS\n" + (HERE / "bare_bwrap.py").read_text()
    hosts: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
        ("no user namespaces", NO_NAMESPACE, lambda said: "kernel.unprivileged_userns_clone" in said),
        ("restricted user namespaces", DENIED_MAP, lambda said: "apparmor_restrict_unprivileged_userns" in said),
        ("docker-default AppArmor", DENIED_MOUNT, lambda said: "AppArmor" in said),
        ("a bwrap that isolates nothing", bare, lambda said: "inner_seccomp" in said and "user_namespace" in said),
    )
    for name, bwrap, explains in hosts[::3] if short else hosts:
        with (
            changed_image(BWRAP, bwrap.encode(), mode=0o755) as tag,
            serve(ready=False, image=tag, pool_size=1, acquire_timeout_seconds=2) as own,
        ):
            serves_nothing(own, name, explains)


def serves_nothing(own: Live, name: str, explains: Callable[[str], bool]) -> None:
    """Check that the service runs nothing, and names what is missing."""
    until(lambda: "starts" in said_by(own), 30, f"{name}: no start fails")
    said = said_by(own)
    check(own.client.get("/ready").status_code == 503, f"{name}: the service is ready")
    check(explains(said), f"{name}: nothing names the setting: {said}")
    answer = own.client.post("/v1/sessions", json={})
    check(answer.status_code == 503, f"{name}: a session was answered {answer.status_code}")
    answer = own.client.post("/v1/execute", json={"code": "print(1)"})
    check(answer.status_code == 503, f"{name}: an execution was answered {answer.status_code}")


def said_by(own: Live) -> str:
    """Return the reasons for which the service is not ready."""
    try:
        return "; ".join(own.client.get("/ready").json()["reasons"])
    except httpx.HTTPError:
        return ""
