"""What the tests of contexts share on both engines: a session over HTTP, its contexts and their cells."""

import importlib.util
import subprocess
from typing import Any

import httpx

SYSTEM_PYTHON = "/usr/bin/python3"
FIND = "import sys; sys.path.append('/usr/lib/python3/dist-packages'); import IPython"


def has_ipython() -> bool:
    """Tell whether the interpreter of the local engine finds IPython."""
    try:
        return subprocess.run([SYSTEM_PYTHON, "-I", "-S", "-c", FIND], capture_output=True, check=False).returncode == 0
    except OSError:
        return importlib.util.find_spec("IPython") is not None


class Ctx:
    """One context of a session."""

    def __init__(self, client: httpx.Client, session: str, **request: Any) -> None:
        self.client = client
        self.session = f"/v1/sessions/{session}"
        answer = client.post(f"{self.session}/contexts", json=request)
        assert answer.status_code == 201, answer.text
        self.id: str = answer.json()["id"]
        self.path = f"{self.session}/contexts/{self.id}"
        assert answer.headers["Location"] == self.path

    def post(self, code: str, **fields: Any) -> httpx.Response:
        """Ask for a cell."""
        body = {"code": code, "context_id": self.id, "timeout_s": 20} | fields
        return self.client.post(f"{self.session}/executions", json=body)

    def run(self, code: str, **fields: Any) -> dict[str, Any]:
        """Run a cell; return the execution."""
        answer = self.post(code, **fields)
        assert answer.status_code == 200, answer.text
        execution: dict[str, Any] = answer.json()
        return execution

    def value(self, code: str, **fields: Any) -> Any:
        """Run a cell that must end well; return its value."""
        execution = self.run(code, **fields)
        assert (execution["outcome"], execution["error"]) == ("ok", None), execution
        return execution["value"]

    def facts(self) -> dict[str, Any]:
        """Read the context."""
        found: dict[str, Any] = self.client.get(self.path).json()
        return found

    def restart(self) -> dict[str, Any]:
        """Restart the context."""
        answer = self.client.post(f"{self.path}/restart")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def main_of(execution: dict[str, Any]) -> Any:
    """Return the text of a cell's last expression."""
    [found] = [display["text/plain"] for display in execution["displays"] if display.get("main")]
    return found


def running(context: Ctx) -> list[str]:
    """Return the ids of a context's cells that run or wait."""
    found = context.client.get(f"{context.session}/executions").json()["executions"]
    return [one["id"] for one in found if one["outcome"] is None and one["context_id"] == context.id]
