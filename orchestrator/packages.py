"""Packages of a session: pip in a sandbox of its own, an execution like any other, into the session's workspace."""

import re

from orchestrator.errors import InvalidRequest, PackagesNotInstalled
from orchestrator.executions import Installation
from orchestrator.models import Execution, SessionRequest
from orchestrator.session import Session
from orchestrator.sessions import Sessions

# -P: no module of the workspace stands in for one of pip's. --no-compile: a workspace has few inodes. Where pip puts
# what it installs, and where the image's wheels are, is in the sandbox's /etc/pip.conf.
PIP = "python3 -P -m pip install --no-input --no-cache-dir --no-compile --progress-bar off".split()
NAME = "[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
EXTRAS = rf"\[ *{NAME}(?: *, *{NAME})* *\]"
VERSION = "(?:===|~=|==|!=|<=|>=|<|>) *[A-Za-z0-9][A-Za-z0-9.*+!_-]*"
REQUIREMENT = re.compile(rf"{NAME} *(?:{EXTRAS})? *(?:{VERSION}(?: *, *{VERSION})*)?")
# What pip takes for a file of the workspace, and not for a name, if there is one.
ARCHIVE = re.compile(r"\.(?:whl|zip|tar|tgz|tbz|txz|tlz|tar\.\w+)\Z", re.IGNORECASE)
SAID_LIMIT = 2000  # characters of pip's own words in a refusal


def check_requirements(packages: list[str]) -> None:
    """Refuse what is no name with versions: pip would take it for an option, a path or an address."""
    for text in packages:
        if not REQUIREMENT.fullmatch(text) or ARCHIVE.search(text, max(0, len(text) - 9)):
            raise InvalidRequest(
                f"`packages` has {text!r}: give names with versions, such as requests or requests==2.*"
            )


def order(session: Session, packages: list[str], *, timeout_s: float | None = None) -> Installation:
    """Return the execution that installs packages. InvalidRequest when there is nowhere to take them from."""
    check_requirements(packages)
    words = list(PIP)
    if session.facts().network == "none":
        if not session.container.has_wheels:
            template = session.container.template
            raise InvalidRequest(
                f"There are no `packages` to install from: the session has no network, and template {template} no wheels"
            )
        words.append("--no-index")
    return Installation(command=[*words, "--", *packages], timeout_s=timeout_s)


async def create_session(sessions: Sessions, request: SessionRequest) -> Session:
    """Start a session with its packages in it; it ends again when they cannot be had."""
    check_requirements(request.packages)
    session = await sessions.create(request)
    if request.packages:
        try:
            execution = await sessions.execute(session.id, order(session, request.packages))
            if execution.outcome != "ok":
                raise PackagesNotInstalled(
                    f"No session was started, for its packages were not installed: {said(execution)}"
                )
        except BaseException:  # cancelled as well: nobody knows of it
            sessions.end(session, "closed")
            raise
    return session


def said(execution: Execution) -> str:
    """Return why pip installed nothing, in its own words as far as it has any."""
    errors = re.findall(r"^ *(?:ERROR|error): (.+)$", execution.stderr, re.MULTILINE)
    words = "; ".join(errors) or (
        execution.error.message if execution.error else execution.stderr.strip()[-SAID_LIMIT:]
    )
    return f"pip ended with `{execution.outcome}`: {words or 'it said nothing'}"[:SAID_LIMIT]
