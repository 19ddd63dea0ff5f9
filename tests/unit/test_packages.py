"""Packages of a session: pip in a sandbox, from wheels on this host; what is no name with versions is refused."""

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.engine.local import interpreter
from orchestrator.errors import InvalidRequest, PackagesNotInstalled
from orchestrator.executions import Installation
from orchestrator.models import Execution
from orchestrator.packages import check_requirements, said
from orchestrator.sdk import SyncSandboxClient
from tests.contexts import has_ipython
from tests.live import Live, serve
from tests.unit.test_reconciler import House, until
from tests.wheels import make_wheels

HAS_PIP = subprocess.run([interpreter(), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
needs_pip = pytest.mark.skipif(not HAS_PIP, reason="this host's Python has no pip")
GREET = "from hello_wheel import greet\ndef handler(event): return greet()"


@pytest.fixture(scope="module")
def live(state_dir: Path) -> Iterator[Live]:
    """A live service with wheels in its default template, and a template without."""
    wheels = state_dir / "wheels"
    make_wheels(wheels)
    file = state_dir / "wheels.toml"
    file.write_text(f'[python]\nwheels = "{wheels}"\n')
    with serve(
        state_dir, instance="test-packages", engine="local", templates_file=str(file), uid_base="120500"
    ) as live:
        yield live


@pytest.fixture
def session(live: Live) -> Iterator[str]:
    path = live.client.post("/v1/sessions").headers["Location"]
    yield path
    live.client.delete(path)


def install(client: httpx.Client, session: str, *packages: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"{session}/packages", json={"packages": packages} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def value(client: httpx.Client, session: str, code: str = GREET) -> Any:
    answer = client.post(f"{session}/executions", json={"code": code}).json()
    assert answer["outcome"] == "ok", answer
    return answer["value"]


@needs_pip
def test_a_package_is_importable_by_all_further_executions(live: Live, session: str) -> None:
    assert (
        live.client.post(f"{session}/executions", json={"code": GREET}).json()["error"]["type"] == "ModuleNotFoundError"
    )
    execution = install(live.client, session, "hello-wheel==1.*")
    assert (execution["outcome"], execution["exit_code"]) == ("ok", 0), execution
    assert "Successfully installed hello-wheel-1.0" in execution["stdout"]
    assert [value(live.client, session) for _ in range(4)] == ["hello 1.0"] * 4  # those that waited meanwhile, too
    shell = {"command": "python3 -c 'import hello_wheel; print(hello_wheel.greet())'; hello-wheel"}
    assert live.client.post(f"{session}/executions", json=shell).json()["stdout"] == "hello 1.0\nhello 1.0\n"


@needs_pip
def test_a_package_brings_what_it_needs_and_may_be_replaced(live: Live, session: str) -> None:
    assert install(live.client, session, "needy")["outcome"] == "ok"
    assert value(live.client, session, "from needy import greet\ndef handler(event): return greet()") == "hello 1.0"
    assert install(live.client, session, "hello_wheel >= 2, < 3")["outcome"] == "ok"
    assert value(live.client, session) == "hello 2.1"


@needs_pip
def test_installations_that_are_asked_for_at_once_all_arrive_and_spoil_nothing(live: Live, session: str) -> None:
    """Each replaces a package of the one before: pip removes its files, which another may be writing."""
    asked = ["hello-wheel==2.1", "needy", "hello-wheel==2.1", "needy"]
    with ThreadPoolExecutor(len(asked)) as pool:
        done = list(pool.map(lambda package: install(live.client, session, package), asked))
    assert [execution["outcome"] for execution in done] == ["ok"] * len(asked), done
    code = "import needy, hello_wheel\ndef handler(event): return [needy.greet(), hello_wheel.greet()]"
    one, other = value(live.client, session, code)
    assert one == other
    files = live.client.get(f"{session}/files", params={"recursive": "true"}).json()["files"]
    known = [file["path"] for file in files if file["path"].endswith(".dist-info")]
    version = one.removeprefix("hello ")
    assert sorted(path.rpartition("/")[2] for path in known) == [
        f"hello_wheel-{version}.dist-info",
        "needy-1.0.dist-info",
    ]


@needs_pip
def test_modules_of_the_workspace_do_not_stand_in_for_pips(live: Live, session: str) -> None:
    write = "for name in ('pip', 'json', 'urllib'): open(name + '.py', 'w').write('raise SystemExit(9)')"
    live.client.post(f"{session}/executions", json={"code": write})
    assert install(live.client, session, "hello-wheel")["outcome"] == "ok"


@needs_pip
def test_a_session_starts_with_its_packages(live: Live) -> None:
    answer = live.client.post("/v1/sessions", json={"packages": ["hello-wheel"]})
    assert answer.status_code == 201
    assert value(live.client, answer.headers["Location"]) == "hello 2.1"
    live.client.delete(answer.headers["Location"])


@needs_pip
@pytest.mark.parametrize(("package", "reason"), [("hello-wheel==9", "No matching distribution"), ("broken", "broken")])
def test_a_session_whose_packages_cannot_be_had_is_not_left_half_made(live: Live, package: str, reason: str) -> None:
    answer = live.client.post("/v1/sessions", json={"id": "half", "packages": [package]})
    assert (answer.status_code, answer.json()["code"]) == (422, "packages_not_installed")
    assert reason in answer.json()["detail"]
    assert live.client.get("/v1/sessions/half").status_code == 404
    assert live.client.get("/v1/sessions").json()["sessions"] == []
    assert live.client.post("/v1/sessions", json={"id": "half"}).status_code == 201
    live.client.delete("/v1/sessions/half")


@needs_pip
def test_what_pip_says_is_in_the_execution(live: Live, session: str) -> None:
    execution = install(live.client, session, "hello-wheel==9")
    assert (execution["outcome"], execution["exit_code"]) == ("error", 1)
    assert "No matching distribution found for hello-wheel==9" in execution["stderr"]
    assert install(live.client, session, "hello-wheel", timeout_s=0.05)["outcome"] == "timeout"
    assert value(live.client, session, "def handler(event): return 1") == 1


@needs_pip
def test_an_installation_may_be_begun_without_waiting(live: Live, session: str) -> None:
    begun = live.client.post(
        f"{session}/packages", json={"packages": ["hello-wheel"]}, headers={"Prefer": "respond-async"}
    )
    assert begun.status_code == 202
    again = {"Idempotency-Key": "once"}
    one, two = (
        live.client.post(f"{session}/packages", json={"packages": ["needy"]}, headers=again).json()["id"] for _ in "12"
    )
    assert one == two


@needs_pip
def test_pips_progress_can_be_followed(live: Live, session: str) -> None:
    accept = {"Accept": "text/event-stream"}
    answer = live.client.post(f"{session}/packages", json={"packages": ["hello-wheel"]}, headers=accept)
    kinds = re.findall(r"^event: ?(\w+)$", answer.text, re.MULTILINE)
    assert (kinds[0], kinds[-1]) == ("started", "done")
    assert "Successfully installed hello-wheel-2.1" in answer.text[: answer.text.index("event: done")]


@needs_pip
@pytest.mark.skipif(not has_ipython(), reason="/usr/bin/python3 has no IPython")
def test_a_context_that_lacked_a_package_has_it_once_it_is_installed(live: Live, session: str) -> None:
    answer = live.client.post(f"{session}/contexts", json={})
    cell = {"code": "import hello_wheel; hello_wheel.greet()", "context_id": answer.json()["id"]}
    assert live.client.post(f"{session}/executions", json=cell).json()["error"]["type"] == "ModuleNotFoundError"
    assert install(live.client, session, "hello-wheel")["outcome"] == "ok"
    assert live.client.post(f"{session}/executions", json=cell).json()["value"] == "hello 2.1"


@needs_pip
def test_the_sdk_installs_packages(live: Live) -> None:
    with SyncSandboxClient(live.url) as client:
        with client.session(packages=["hello-wheel<2"]) as session:
            assert session.run(GREET).value == "hello 1.0"
            assert session.install(["hello-wheel>=2"]).outcome == "ok"
            assert session.run(GREET).value == "hello 2.1"
        with pytest.raises(PackagesNotInstalled, match="No matching distribution"):
            client.create_session(packages=["nothing-here"])


async def test_installations_run_one_after_the_other_beside_other_executions() -> None:
    async with House().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        order = Installation(command=["pip"], timeout_s=100.0)
        first, second, third, fourth = (house.sessions.start("s", order) for _ in range(4))
        await until(lambda: agent.executed == [first.id])
        beside = house.execute("s")
        await until(lambda: len(agent.executed) == 2)
        house.sessions.cancel("s", second.id)
        assert await house.sessions.ended(second)
        agent.finish(agent.executed[1])
        assert (await beside).outcome == "ok"
        house.sessions.cancel("s", first.id)
        await until(lambda: agent.executed[2:] == [third.id])
        agent.finish(third.id)
        await until(lambda: agent.executed[3:] == [fourth.id])
        agent.finish(fourth.id)
        assert await house.sessions.ended(fourth)
        done = [record.facts.outcome for record in (first, second, third, fourth)]
        assert done == ["cancelled", "cancelled", "ok", "ok"]
        assert session.installs.take()


def test_without_wheels_and_network_there_is_nothing_to_install_from(client: httpx.Client) -> None:
    session = client.post("/v1/sessions").headers["Location"]
    for answer in (
        client.post(f"{session}/packages", json={"packages": ["requests"]}),
        client.post("/v1/sessions", json={"id": "none", "packages": ["requests"]}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
        assert "template python no wheels" in answer.json()["detail"]
    assert client.get("/v1/sessions/none").status_code == 404
    client.delete(session)


@pytest.mark.parametrize(
    "text",
    [
        "requests",
        "Requests==2.*",
        "a",
        "a-b_c.d",
        "a[x]",
        "a[x, y-z] >= 1.0, != 1.5",
        "a ~= 1.4.2",
        "a===1.0+local",
        "a<2",
    ],
)
def test_names_with_versions_are_taken(text: str) -> None:
    check_requirements([text])


HOSTILE = [
    "", " ", "-r file", "--index-url=x", "-e .", ".", "./here", "/etc/passwd", "a/b", "..", "a @ file:///etc", "a@b",
    "https://x/y.whl", "git+ssh://x", "file:x", "a; python_version<'3'", "a==1 --index-url x", "a\n-r b", "a\n", "a==1\n",
    "a b", "a==", "==1", "a==$(id)", "a==`id`", "a==1;id", "a==-r", "a[--x]", "a[", "é", "a\0", "local.whl", "x.tar.gz",
    "x.zip", "x.TGZ", "-", "a-", "a==1,", "${HOME}", "a==1 # x",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_name_with_versions_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="such as requests or requests==2"):
        check_requirements(["ok", text])


@pytest.mark.parametrize(
    "body", [{}, {"packages": []}, {"packages": ["x" * 201]}, {"packages": ["a"] * 65}, {"packages": "a"}, {"packages": [1]}, {"packages": ["-r x"]}]
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    session = client.post("/v1/sessions").headers["Location"]
    answer = client.post(f"{session}/packages", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert client.post("/v1/sessions/unknown/packages", json={"packages": ["a"]}).status_code == 404
    client.delete(session)


def test_a_refusal_says_what_pip_said() -> None:
    blank = {"id": "e", "session_id": "s", "started_at": "2030-01-01T00:00:00Z", "language": "shell"}
    execution = Execution(**blank, outcome="error", stderr="WARNING: x\nERROR: one\n  ERROR: two\n")  # type: ignore[arg-type]
    assert said(execution) == "pip ended with `error`: one; two"
    execution.stderr = "/usr/bin/python3: No module named pip\n"
    assert said(execution) == "pip ended with `error`: /usr/bin/python3: No module named pip"
    execution.stderr, execution.outcome = "", "timeout"
    assert said(execution) == "pip ended with `timeout`: it said nothing"
