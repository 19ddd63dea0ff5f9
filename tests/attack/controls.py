"""Controls: the same code in plain containers. A runner that finds no escape there could not find one here."""

import time
from collections.abc import Sequence

import docker
import docker.errors
from docker.utils import kwargs_from_env

from tests.attack.cases import Case
from tests.live import IMAGE

LIMIT_S = 10.0
POLL_S = 0.05
# Left out: what would harm the host in a container without limits, or speak to the network that the host is in.
LEFT_OUT = {
    "proc-01": "forks without end",
    "proc-13": "starts threads without end",
    "proc-14": "forks 5000 times",
    "mem-10": "creates files without end",
    "disk-01": "writes without end",
    "disk-02": "writes without end",
    "disk-05": "creates directories without end",
    "net-01": "would knock at the host's network",
    "net-02": "would knock at the host's network",
}


def single_shots(cases: Sequence[Case]) -> list[Case]:
    """Return the code cases that tell by themselves, once and soon, whether they escaped."""
    return [
        case
        for case in cases
        if case.kind == "code"
        and case.expect["status"] == "ok"
        and any("VERDICT:BLOCKED" in text for text in case.expect["stdout_contains"])
        and case.id not in LEFT_OUT
    ]


def escaped(api: docker.APIClient, case: Case) -> str | None:
    """Run a case as `docker run` would, with default options; return what shows that it escaped, if it did."""
    container = api.create_container(IMAGE, ["-c", case.payload], entrypoint=["python3"], working_dir="/workspace")[
        "Id"
    ]
    try:
        api.start(container)
        code = exit_code(api, container)
        output = api.logs(container).decode(errors="replace")
    finally:
        api.remove_container(container, force=True, v=True)
    if "VERDICT:ESCAPED" in output:
        return output[output.index("VERDICT:ESCAPED") :].split("\n")[0][:100]
    return f"still alive after {LIMIT_S:g} s" if code is None else None


def exit_code(api: docker.APIClient, container: str) -> int | None:
    """Wait for a container's end; return its exit code, None when it does not end in time."""
    end_at = time.monotonic() + LIMIT_S
    while time.monotonic() < end_at:
        state = api.inspect_container(container)["State"]
        if state["Status"] == "exited":
            return int(state["ExitCode"])
        time.sleep(POLL_S)
    return None


def report(cases: Sequence[Case]) -> bool:
    """Print what escapes from plain containers; return whether anything did, as it must."""
    chosen = single_shots(cases)
    print("\ncontrols: the same code in plain `docker run` containers", flush=True)
    if not chosen:
        print("none of the chosen cases is a single shot: no control", flush=True)
        return True
    api = docker.APIClient(**kwargs_from_env(), version="auto", timeout=60)
    count = 0
    for case in chosen:
        if (shown := escaped(api, case)) is not None:
            count += 1
            print(f"escaped {case.id:<9} {shown}", flush=True)
    api.close()
    print(f"{count} of {len(chosen)} escape without this sandbox")
    if not count:
        print("FAIL: the controls found no escape, so the runner proves nothing")
    return count > 0
