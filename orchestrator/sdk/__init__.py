"""The client: `SandboxClient` for asyncio and `SyncSandboxClient` for the rest, with typed results and one tree of errors.

The two only send calls. Their methods are listed once, as the functions that build these, and have their parameters.
"""

from orchestrator.sdk.awaiting import OpenContext, OpenSession, SandboxClient
from orchestrator.sdk.blocking import SyncOpenContext, SyncOpenSession, SyncSandboxClient

__all__ = ["OpenContext", "OpenSession", "SandboxClient", "SyncOpenContext", "SyncOpenSession", "SyncSandboxClient"]
