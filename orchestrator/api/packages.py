"""The packages of a session: an execution of pip, answered as any other."""

from typing import Any

from litestar import Request, Response

from orchestrator import packages
from orchestrator.api.executions import IdempotencyKey, Prefer, answer, begins
from orchestrator.api.paths import Sid
from orchestrator.models import Execution, PackagesRequest
from orchestrator.service import Orchestrator


@begins("/sessions/{sid:str}/packages", summary="Install packages", at_once="It was begun, as `Prefer` asks")
async def install_packages(
    service: Orchestrator,
    request: Request[Any, Any, Any],
    sid: Sid,
    data: PackagesRequest,
    key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response[Execution]:
    """Install Python packages into the session, for all its further executions.

    It is an execution of pip: its outcome and what it prints tell how it went, and it is answered, streamed, listed and
    cancelled as any other.
    """
    order = packages.order(service.sessions.get(sid), data.packages, timeout_s=data.timeout_s)
    return await answer(service, request, sid, order, key=key, prefer=prefer)


handlers = [install_packages]
