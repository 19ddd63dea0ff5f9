"""The tools that a model gets by the Model Context Protocol. Imported when the first client comes."""

import base64
import hashlib
import mimetypes
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Annotated, Literal

from litestar.types import Receive, Scope, Send
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import Field
from sse_starlette.sse import AppStatus

from orchestrator import __version__
from orchestrator.api.results import displayed, facts_of, plain, result, told
from orchestrator.errors import InvalidRequest, SandboxError, SessionEnded, SessionExists, SessionNotFound
from orchestrator.models import ContextRequest, ExecutionRequest, SessionRequest
from orchestrator.service import Orchestrator

SESSIONS = 1000  # MCP sessions that are open at once; a container is taken with the first call of a tool only
READ_LIMIT, IMAGE_LIMIT = 128 << 10, 700 << 10  # bytes of a file, and of an image: what surely fits an event
CONTEXT = "mcp"  # the id of the context that cells run in
INSTRUCTIONS = (
    "Runs untrusted code in isolated sandboxes without a network. Files in the working directory /workspace last for "
    "the session. Variables last from cell to cell of run_cell; run_code and run_command are a new process each time."
)
NAMELESS = "You have no session yet: name one in `session_id`, or begin one by running code"
ABOUT_SESSION = (
    "Leave it out to use your own session. Where a result names a session, pass its id to go on with the same files."
)
SessionId = Annotated[str | None, Field(description=ABOUT_SESSION, max_length=63)]
TimeoutS = Annotated[float | None, Field(description="seconds after which it is killed", gt=0)]
Path = Annotated[str, Field(description="path in /workspace, relative to it", max_length=4096)]
Reading, Writing = ToolAnnotations(read_only_hint=True), ToolAnnotations(read_only_hint=False, open_world_hint=False)


class Tools:
    """The MCP server of one service. An MCP session has a sandbox session of its own, begun by its first call."""

    def __init__(self, service: Orchestrator) -> None:
        self._service = service
        self._sessions = service.sessions
        server = MCPServer("sandbox", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING")
        for tool, hints in (
            (self.run_cell, Writing),
            (self.run_code, Writing),
            (self.run_command, Writing),
            (self.read_file, Reading),
            (self.write_file, Writing),
            (self.list_files, Reading),
            (self.list_sessions, Reading),
            (self.end_session, Writing),
        ):
            server.add_tool(tool, annotations=hints, structured_output=False)
        # At the end of the service our streams end with their executions, whose results are to arrive.
        AppStatus.enable_automatic_graceful_drain = False
        server.streamable_http_app(
            session_idle_timeout=service.settings.idle_timeout_seconds,
            max_sessions=SESSIONS,
            max_request_body_size=service.settings.max_body,
            host="0.0.0.0",  # noqa: S104 - Host and Origin are checked before: by the gate and the door
        )
        self._manager: StreamableHTTPSessionManager = server.session_manager

    def run(self) -> AbstractAsyncContextManager[None]:
        """Serve inside this context."""
        return self._manager.run()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._manager.handle_request(scope, receive, send)  # type: ignore[arg-type]

    @staticmethod
    def session_of(number: str) -> str:
        """Return the sandbox session of an MCP session, whose own id is a secret of its client."""
        return f"mcp-{hashlib.sha256(number.encode()).hexdigest()[:32]}"

    # --- tools

    async def run_cell(
        self,
        ctx: Context,
        code: Annotated[str, Field(description="Python as in a notebook's cell: %magics and !commands too")],
        timeout_s: TimeoutS = None,
        session_id: SessionId = None,
    ) -> CallToolResult:
        """Run Python as a cell of a notebook: variables stay, the last expression and figures are shown."""
        sid, note = await self._session(ctx, session_id)
        with said():
            renewed = await self._context(sid)
        request = ExecutionRequest(code=code, context_id=CONTEXT, timeout_s=timeout_s)
        return await self._execute(ctx, sid, request, notes=[renewed, note])

    async def run_code(
        self,
        ctx: Context,
        code: Annotated[str, Field(description="Python or JavaScript, or a script for bash")],
        language: Literal["python", "javascript", "shell"] = "python",
        stdin: Annotated[str, Field(description="what it reads from stdin")] = "",
        timeout_s: TimeoutS = None,
        session_id: SessionId = None,
    ) -> CallToolResult:
        """Run code to its end in a fresh sandbox; print what you want to see. Returns output, errors and changed files."""
        request = ExecutionRequest(language=language, code=code, stdin=stdin, timeout_s=timeout_s)
        return await self._execute(ctx, session_id, request)

    async def run_command(
        self,
        ctx: Context,
        command: Annotated[str, Field(description="a command line for bash")],
        timeout_s: TimeoutS = None,
        session_id: SessionId = None,
    ) -> CallToolResult:
        """Run a command line in a fresh sandbox. Returns output, exit code and changed files."""
        return await self._execute(ctx, session_id, ExecutionRequest(command=command, timeout_s=timeout_s))

    async def read_file(
        self,
        ctx: Context,
        path: Path,
        offset: Annotated[int, Field(description="first byte", ge=0)] = 0,
        session_id: SessionId = None,
    ) -> CallToolResult:
        """Read a file of the workspace, at most 128 KiB at once. Images up to 700 KiB are shown."""
        sid, note = await self._session(ctx, session_id, begins=False)
        with said(), self._sessions.get(sid).in_use() as workspace:
            kind = mimetypes.guess_type(path)[0] or ""
            is_image = kind.startswith("image/") and offset == 0
            download = await workspace.read(path, start=offset, length=IMAGE_LIMIT if is_image else READ_LIMIT)
            data = b"".join([piece async for piece in download.chunks()])
        if is_image and download.file.size_bytes <= IMAGE_LIMIT:
            return result([note], images=[(kind, base64.b64encode(data).decode())])
        data = data[:READ_LIMIT]
        rest = download.file.size_bytes - offset - len(data)
        more = [f"[{rest} bytes follow: read on at offset {offset + len(data)}]"] if rest > 0 else []
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text, more = base64.b64encode(data).decode(), ["[this is base64: the file is no text]", *more]
        return result([text, *more, note])

    async def write_file(
        self,
        ctx: Context,
        path: Path,
        content: Annotated[str, Field(description="the whole content of the file")],
        encoding: Literal["text", "base64"] = "text",
        session_id: SessionId = None,
    ) -> CallToolResult:
        """Write a file to the workspace, and make the directories above it. It replaces what is there."""
        with said():
            data = content_of(content, encoding)
        sid, note = await self._session(ctx, session_id)
        session = self._sessions.get(sid)
        with said(), session.in_use() as workspace:
            file = await workspace.write(path, one(data), limit=self._service.workspace_bytes(session))
        return result([f"wrote {file.size_bytes} bytes to {file.path}", note])

    async def list_files(
        self,
        ctx: Context,
        path: Annotated[str, Field(description="a directory; left out, the workspace")] = "",
        session_id: SessionId = None,
    ) -> CallToolResult:
        """List the files of the workspace below a directory, at most 1000."""
        sid, note = await self._session(ctx, session_id, begins=False)
        with said(), self._sessions.get(sid).in_use() as workspace:
            page = await workspace.list(path, recursive=True, limit=1000, after=None)
        lines = [f"{file.path}  {file.type}  {file.size_bytes} bytes" for file in page.files]
        return result([*(lines or ["there are no files"]), "[there are more]" if page.next else "", note])

    async def list_sessions(self) -> CallToolResult:
        """List the sessions that live, with their templates."""
        sessions = [session.facts() for session in self._sessions.held.values()]
        lines = [f"{facts.id}  template {facts.template}, {facts.executions} executions" for facts in sessions]
        return result(lines or ["no session lives"], facts={"sessions": plain(sessions)})

    async def end_session(self, ctx: Context, session_id: SessionId = None) -> CallToolResult:
        """End a session: its files are deleted."""
        with said():
            sid = session_id or self._own(ctx)
            if sid is None:
                raise InvalidRequest(NAMELESS)
            self._sessions.end(self._sessions.get(sid), "closed")
        return result([f"the session {sid} has ended"])

    # --- sessions

    def _own(self, ctx: Context) -> str | None:
        number = (ctx.headers or {}).get("mcp-session-id")
        return None if number is None else self.session_of(number)

    async def _session(self, ctx: Context, asked: str | None, *, begins: bool = True) -> tuple[str, str]:
        """Return the session to use, and what is to be said of it. One that is missing is started, if the call `begins`
        one, or belongs to an MCP session.
        """
        with said():
            if asked is not None:
                return self._sessions.get(asked).id, ""
            own, note = self._own(ctx), ""
            if own is None and not begins:
                raise InvalidRequest(NAMELESS)
            if own is not None:
                await self._sessions.settled(own)
                try:
                    return self._sessions.get(own).id, ""
                except SessionNotFound:
                    pass
                except SessionEnded as error:
                    note = f"[{error.detail}; this is one, without the files of the old]"
            try:
                session = await self._sessions.create(SessionRequest(id=own, metadata={"client": "mcp"}))
            except SessionExists:
                return await self._session(ctx, asked, begins=begins)
            return session.id, note or ("" if own else f"[session_id: {session.id}]")

    async def _context(self, sid: str) -> str:
        """See that the session has a living interpreter for cells; return what is to be said of it."""
        contexts, deadline_s = self._sessions.get(sid).container.contexts, self._service.settings.start_timeout_seconds
        if CONTEXT not in contexts.held:
            self._sessions.admission.context(in_session=len(contexts.held))
            await contexts.open(ContextRequest(id=CONTEXT), deadline_s=deadline_s)
        elif contexts.get(CONTEXT).state == "dead":
            await contexts.restart(CONTEXT, deadline_s=deadline_s)
            return "[the interpreter had ended and was started anew: variables are gone]"
        return ""

    async def _execute(
        self, ctx: Context, asked: str | None, request: ExecutionRequest, *, notes: list[str] | None = None
    ) -> CallToolResult:
        sid, note = await self._session(ctx, asked)
        with said():
            execution = await self._sessions.execute(sid, request)
        texts, images = displayed(execution)
        lines = told(execution, also=texts) or ([] if images else ["[no output]"])
        lines += notes or [note]
        return result(lines, images=images, facts=facts_of(execution), failed=execution.outcome != "ok")


@contextmanager
def said() -> Iterator[None]:
    """Turn an error of ours into one that the model can read."""
    try:
        yield
    except SandboxError as error:
        raise ToolError(f"{error.detail} ({error.code})") from error


def content_of(content: str, encoding: str) -> bytes:
    """Return the bytes of a file. InvalidRequest for what is no base64."""
    if encoding == "text":
        return content.encode()
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"`content` is no base64: {error}") from None


async def one(data: bytes) -> AsyncIterator[bytes]:
    """Yield the data."""
    yield data
