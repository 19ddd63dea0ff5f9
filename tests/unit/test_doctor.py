"""The doctor: its checks over texts of hosts that we do not have, and the whole of it on this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import isolation, settings
from orchestrator.beside import beside
from orchestrator.doctor import examination, host
from orchestrator.doctor.report import Finding, Report, pretty
from orchestrator.engine.docker import DockerEngine
from orchestrator.engine.local import LocalEngine
from tests.live import environment, open_folder

MOUNTS_V1 = """\
tmpfs /sys/fs/cgroup tmpfs ro,mode=755 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""
MOUNTS_V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
ACTIONS = "kill_process kill_thread trap errno user_notif trace log allow\n"
STATUS = "Name:\tpython3\nSeccomp:\t0\nSeccomp_filters:\t0\n"
HEALTHY: dict[str, str | None] = {
    "clone": None,
    "namespaces": "96551\n",
    "apparmor": None,
    "actions": ACTIONS,
    "status": STATUS,
    "mounts": MOUNTS_V2,
    "core_pattern": "core\n",
}


@pytest.mark.parametrize(
    ("clone", "namespaces", "apparmor", "status", "hint"),
    [
        (None, "96551\n", None, "ok", ""),
        ("1\n", "96551\n", "0\n", "ok", ""),
        ("0\n", "96551\n", None, "warning", "kernel.unprivileged_userns_clone=0"),
        (None, "0\n", None, "warning", "user.max_user_namespaces=0"),
        (None, None, None, "warning", "CONFIG_USER_NS"),
        ("1\n", "96551\n", "1\n", "warning", "kernel.apparmor_restrict_unprivileged_userns=1"),
    ],
)
def test_user_namespaces(
    clone: str | None, namespaces: str | None, apparmor: str | None, status: str, hint: str
) -> None:
    found = host.check_user_namespaces(clone, namespaces, apparmor)

    assert found.status == status
    assert hint in found.hint


def test_every_obstacle_to_user_namespaces_is_named() -> None:
    assert host.check_user_namespaces("0", "0", "1").hint.count(": set it to") == 3


@pytest.mark.parametrize(
    ("actions", "status", "expected"),
    [
        (ACTIONS, STATUS, "ok"),
        (None, STATUS, "warning"),
        ("allow", STATUS, "warning"),
        (ACTIONS, "Seccomp:\t0\n", "warning"),
    ],
)
def test_seccomp(actions: str | None, status: str, expected: str) -> None:
    assert host.check_seccomp(actions, status).status == expected


@pytest.mark.parametrize(
    ("mounts", "status", "detail"),
    [
        (MOUNTS_V1, "ok", "version 1"),
        (MOUNTS_V2, "ok", "version 2"),
        ("proc /proc proc rw 0 0\n", "warning", "none mounted"),
    ],
)
def test_cgroup(mounts: str, status: str, detail: str) -> None:
    found = host.check_cgroup(mounts)

    assert (found.status, found.detail) == (status, detail)


@pytest.mark.parametrize(
    ("pattern", "engine", "expected"),
    [
        ("core\n", "local", "ok"),
        (None, "local", "ok"),
        ("|/usr/share/apport/apport -p%p\n", "local", "warning"),
        ("|/usr/share/apport/apport -p%p\n", "docker", "ok"),
        ("|\n", "local", "warning"),
    ],
)
def test_core_dumps(pattern: str | None, engine: str, expected: str) -> None:
    assert host.check_core_pattern(pattern, engine=engine).status == expected


@pytest.mark.parametrize(
    ("version", "engine", "expected"),
    [
        ("bubblewrap 0.8.0\n", "local", "ok"),
        ("bubblewrap 0.11.0\n", "local", "ok"),
        ("bubblewrap 1.0\n", "local", "ok"),
        ("bubblewrap 0.4.1\n", "local", "warning"),
        ("", "local", "warning"),
        (None, "local", "MISSING"),
        (None, "docker", "skipped"),
    ],
)
def test_bubblewrap(version: str | None, engine: str, expected: str) -> None:
    assert host.check_bwrap(version, engine=engine).status == expected


def test_a_healthy_host_has_nothing_to_be_hinted_at() -> None:
    found = host.host_findings(HEALTHY, "bubblewrap 0.8.0", system="Linux", engine="local")

    assert {finding.status for finding in found} == {"ok"}
    assert {finding.hint for finding in found} == {""}


def test_another_system_is_left_to_its_engine() -> None:
    (found,) = host.host_findings(dict.fromkeys(HEALTHY), None, system="Darwin", engine="docker")

    assert (found.status, found.detail) == ("warning", "Darwin")


def test_a_layer_is_missing_only_where_it_is_required() -> None:
    layers = {"container": False, "no_network": False, "own_uid": True}

    assert examination.check_layers(layers, LocalEngine.required_layers) == [
        Finding(about="container", name="container", status="skipped", detail="this engine does without"),
        Finding(about="container", name="no_network", status="MISSING", hint=isolation.HINTS["no_network"]),
        Finding(about="container", name="own_uid", status="ok"),
    ]


@pytest.mark.parametrize("engine", [DockerEngine, LocalEngine])
def test_every_required_layer_has_a_hint(engine: type[DockerEngine | LocalEngine]) -> None:
    assert engine.required_layers <= set(isolation.HINTS)


def test_the_engines_facts_are_shown_for_people() -> None:
    facts = {"version": "26.1", "cpus": 2, "rootless": False, "runtimes": ["runc", "runsc"]}

    found = {finding.name: finding.detail for finding in examination.engine_findings("docker", facts)}

    assert found == {
        "docker": "26.1",
        "cpus": "2",
        "rootless": "no",
        "runtimes": "runc, runsc",
        "seccomp": "yes",
    }


def test_a_short_life_beside_a_service_shares_nothing_with_it() -> None:
    chosen = settings.load({"SANDBOX_UID_BASE": "50000"})
    with beside(chosen) as own, beside(chosen) as other:
        folders = {Path(life.state_dir) for life in (own, other, chosen)}
        assert len({life.instance for life in (own, other, chosen)}) == len(folders) == 3
        assert own.uid_base not in range(50000, 50450)
        assert Path(own.state_dir).stat().st_mode & 0o777 == 0o711
    assert not Path(own.state_dir).exists()


def examine(**more: str) -> tuple[int, str, str]:
    with open_folder() as folder:
        given = environment(uid_base="30000", state_dir=str(folder)) | {"TMPDIR": str(folder)} | more
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "orchestrator",
                "doctor",
                "--format",
                "json",
                "--engine",
                more.pop("engine", "local"),
            ],
            check=False,
            capture_output=True,
            text=True,
            env=given,
        )
        assert list(folder.iterdir()) == []
    return done.returncode, done.stdout, done.stderr


def test_this_host_is_examined_with_a_real_container() -> None:
    """On the local engine, which every test host has."""
    code, shown, said = examine()

    report = json.loads(shown)
    found = {finding["name"]: finding["status"] for finding in report["findings"] if finding["about"] == "container"}
    assert (code, said, report["ok"], report["engine"]) == (0, "", True, "local")
    assert {found[name] for name in ("start", *LocalEngine.required_layers)} == {"ok"}
    assert found["container"] == "skipped"


def test_a_host_without_its_engine_ends_with_1() -> None:
    code, shown, said = examine(engine="docker", DOCKER_HOST="unix:///nowhere")

    report = json.loads(shown)
    assert (code, said, report["ok"]) == (1, "", False)
    assert report["findings"][-1]["status"] == "MISSING"
    assert "No Docker Engine answers" in report["findings"][-1]["hint"]


def test_a_host_without_bubblewrap_ends_with_1() -> None:
    with open_folder() as folder:
        (folder / "bin").mkdir()
        code, shown, _ = examine(PATH=os.fspath(folder / "bin"))

    missing = [finding["name"] for finding in json.loads(shown)["findings"] if finding["status"] == "MISSING"]
    assert (code, missing) == (1, ["bubblewrap", "local"])


def test_the_report_for_people_groups_and_hints() -> None:
    found = [
        Finding(about="host", name="platform", status="ok", detail="Linux"),
        Finding(about="container", name="start", status="MISSING", hint="it did not start"),
        Finding(about="container", name="own_uid", status="warning", detail="odd", hint="look"),
    ]

    assert pretty(Report(engine="docker", ok=False, findings=found)).splitlines() == [
        "host",
        "  ok       platform         Linux",
        "container",
        "  MISSING  start            it did not start",
        "  warning  own_uid          odd: look",
        "On the engine docker sessions cannot be served.",
    ]
