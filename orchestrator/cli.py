"""The command line: serve, examine the host, run one script, show the settings."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click
import msgspec

from orchestrator import __version__, settings
from orchestrator.errors import EngineError, InvalidRequest, SandboxError, SettingsError
from orchestrator.models import LANGUAGES, Event, Execution, Language, OneShotRequest, SessionRequest
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.service import Orchestrator

T = TypeVar("T")
Show = Callable[[Event], None]
CODE_FAILED, MISUSED, NOT_RUN, TIMED_OUT, INTERRUPTED = 1, 2, 3, 124, 130
EXIT_CODES = {"ok": 0, "timeout": TIMED_OUT, "lost": NOT_RUN, "cancelled": NOT_RUN}
ENDINGS: dict[str, Language] = {".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".sh": "shell"}
LOOK_S = 0.1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Run untrusted code in warm containers, each execution in a fresh bubblewrap sandbox."""


def fail(text: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"orchestrator: {' '.join(text.split())}", err=True)
    raise click.exceptions.Exit(code)


def load(**overrides: str | int | None) -> Settings:
    """Read the settings from the environment; options that were given take its place."""
    given = {f"SANDBOX_{name.upper()}": str(value) for name, value in overrides.items() if value is not None}
    try:
        return settings.load(os.environ | given)
    except SettingsError as error:
        fail(error.detail, MISUSED)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine. Ctrl-C and SIGTERM cancel it, so that it cleans up behind itself."""

    async def with_signals() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(with_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise click.exceptions.Exit(INTERRUPTED) from None


@main.command()
@click.option("--host", help="Address to listen on, in place of SANDBOX_HOST.")
@click.option("--port", type=int, help="Port to listen on, in place of SANDBOX_PORT.")
@click.option("--engine", type=click.Choice(["docker", "local"]), help="In place of SANDBOX_ENGINE.")
@click.option("--on-exit", type=click.Choice(["keep", "remove"]), help="In place of SANDBOX_ON_EXIT.")
def serve(host: str | None, port: int | None, engine: str | None, on_exit: str | None) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C.

    At the end, nothing new is admitted, what runs may finish (SANDBOX_DRAIN_SECONDS), ready containers are removed, and
    sessions stay for the next start to adopt, which must come within ten minutes; with --on-exit remove nothing stays.
    Settings are environment variables; `orchestrator settings` lists them. A start that fails ends with exit code 2.
    """
    chosen = load(host=host, port=port, engine=engine, on_exit=on_exit)
    from orchestrator import log, server

    log.configure(chosen.log_level, chosen.log_format)
    try:
        server.run(chosen)
    except (SandboxError, ExceptionGroup) as error:
        cause = innermost(error)
        if not isinstance(cause, SandboxError):
            raise
        fail(cause.detail, MISUSED)


def innermost(error: BaseException) -> BaseException:
    """Return what was raised first: Litestar puts what its lifespan raises into a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@main.command()
@click.argument("script", type=click.File(encoding="utf-8"))
@click.option("--language", type=click.Choice(LANGUAGES), help="The script's; unless given, its name's ending tells.")
@click.option("--event", metavar="JSON", help="The handler's event; {} unless given.")
@click.option(
    "--event-file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read the event from a file, or - for stdin.",
)
@click.option("--context", metavar="JSON", help="Facts to add to the handler's context: a JSON object.")
@click.option("--timeout", type=float, metavar="S", help="Seconds; the service's SANDBOX_TIMEOUT_SECONDS unless given.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["json", "yaml", "pretty"]),
    default="json",
    show_default=True,
    help="How the value is written; `pretty` is JSON with indentation.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the value to a file, not to stdout.",
)
@click.option("--quiet", is_flag=True, help="Do not show what the code printed.")
@click.option("--stream", "is_streamed", is_flag=True, help="Show what the code prints when it prints it.")
@click.option(
    "--url",
    envvar="SANDBOX_URL",
    show_envvar=True,
    help="A running service; without one, a container is started here.",
)
@click.option("--api-key", envvar="SANDBOX_API_KEY", show_envvar=True, help="The service's key.")
def run(
    script: TextIO,
    language: Language | None,
    event: str | None,
    event_file: TextIO | None,
    context: str | None,
    timeout: float | None,
    style: str,
    output: Path | None,
    quiet: bool,  # noqa: FBT001 - click passes options by name
    is_streamed: bool,  # noqa: FBT001 - the same
    url: str | None,
    api_key: str | None,
) -> None:
    """Run a SCRIPT once in a sandbox (- is stdin), and print what its `handler` returned.

    It is Python, but JavaScript when its name ends in .js, .mjs or .cjs, and shell when it ends in .sh.

    The value alone goes to stdout, so that it can be piped on. What the code printed, to stdout or to stderr, goes to
    stderr, unless --quiet; one more line there tells why there is no value.

    \b
    Exit codes:
      0    the value was written
      1    the code raised, exited with another code than 0, or was killed at a limit
      2    wrong options or settings
      3    not run, or not to its end: no service, no engine, no container
      124  the timeout was exceeded
    """  # noqa: D301 - the escape is click's mark for a paragraph that it is not to wrap
    if event is not None and event_file is not None:
        raise click.UsageError("Give --event or --event-file, not both.")
    given_event = read_text(event_file, "--event-file") if event_file is not None else event
    fields = {
        "code": read_text(script, "SCRIPT"),
        "language": language or ENDINGS.get(Path(script.name).suffix, "python"),
        "event": {} if given_event is None else parse(given_event, "--event"),
        "context": {} if context is None else parse(context, "--context"),
        "timeout_s": timeout,
    }
    try:
        show = show_event if is_streamed and not quiet else None
        execution = run_remote(fields, url, api_key, show) if url else run_to_end(run_here(load(), fields, show))
    except (InvalidRequest, SettingsError) as error:
        fail(error.detail, MISUSED)
    except SandboxError as error:
        fail(error.detail, NOT_RUN)
    if not quiet and show is None:
        click.echo(execution.stdout, err=True, nl=False)
        click.echo(execution.stderr, err=True, nl=False)
    if execution.outcome != "ok":
        fail(explain(execution), EXIT_CODES.get(str(execution.outcome), CODE_FAILED))
    write(render(execution.value, style), output)


def show_event(event: Event) -> None:
    """Show what the code printed."""
    click.echo(event.text, err=True, nl=False)


def run_remote(fields: dict[str, Any], url: str, api_key: str | None, show: Show | None) -> Execution:
    """Run through a running service; with `show` in a session of its own, which tells what happens."""
    from orchestrator.sdk import SyncSandboxClient

    with SyncSandboxClient(url, api_key=api_key) as client:
        if show is None:
            return client.execute(**fields)
        with client.session() as session:
            for event in session.stream(**fields):
                show(event)
        assert event.execution is not None  # of `done`, which is the last one
        return event.execution


async def run_here(chosen: Settings, fields: dict[str, Any], show: Show | None) -> Execution:
    """Run in a container that is started for it. EngineError as soon as one fails to start."""
    from orchestrator import log
    from orchestrator.doctor import beside
    from orchestrator.service import Orchestrator

    log.configure("error", chosen.log_format)
    try:
        request = msgspec.convert(fields, OneShotRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    with beside(chosen) as own:
        service = Orchestrator(own)
        for pool in service.pools.values():  # one container is started because it is waited for, and no other
            template = msgspec.structs.replace(pool.recipe.template, pool_size=0)
            pool.recipe = msgspec.structs.replace(pool.recipe, template=template)
        async with service.run(alone=True):
            once = service.sessions.execute_once(request) if show is None else follow(service, request, show)
            execution = asyncio.create_task(once)
            try:
                while not execution.done():
                    await asyncio.wait({execution}, timeout=LOOK_S)
                    if service.reconciler.starts.fault is not None:
                        raise EngineError(service.reconciler.starts.fault)
                # As over HTTP: the value is still the bytes that came out of the sandbox.
                return msgspec.json.decode(msgspec.json.encode(execution.result()), type=Execution)
            finally:
                execution.cancel()
                await asyncio.wait({execution})


async def follow(service: "Orchestrator", request: OneShotRequest, show: Show) -> Execution:
    """Run in a session of its own, and show what happens when it does."""
    from orchestrator.events import Reader
    from orchestrator.following import parsed

    session = await service.sessions.create(SessionRequest())
    record = service.sessions.start(session.id, request)
    reader = Reader(record)
    while True:
        for event in parsed(reader.take()):
            show(event)
        if reader.ended:
            return record.facts
        await reader.woken.wait()


def read_text(file: TextIO, name: str) -> str:
    """Read a file that an option names; a usage error when it is no text."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: {file.name} is no UTF-8 text: {error.reason}.") from None


def parse(text: str, name: str) -> Any:
    """Parse an option's JSON; a usage error when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise click.UsageError(f"{name} is no JSON: {error}.") from None


def explain(execution: Execution) -> str:
    """Tell why an execution has no value."""
    if execution.error is not None:
        return f"{execution.outcome}: {execution.error.type}: {execution.error.message}"
    if execution.outcome == "error":
        return f"error: exit code {execution.exit_code}"
    return str(execution.outcome)


def render(value: Any, style: str) -> str:
    """Return the value as text, with a newline at its end."""
    if style == "yaml":
        import yaml

        return yaml.safe_dump(value, allow_unicode=True, sort_keys=False)
    text = msgspec.json.encode(value)
    return (msgspec.json.format(text, indent=2) if style == "pretty" else text).decode() + "\n"


def write(text: str, output: Path | None) -> None:
    """Write to a file, or to stdout."""
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}", MISUSED)


@main.command()
@click.argument("session")
@click.option("--command", "-c", metavar="LINE", help="A line for bash in the place of a login shell.")
@click.option(
    "--url", envvar="SANDBOX_URL", show_envvar=True, help="The running service; http://localhost:8000 unless given."
)
@click.option("--api-key", envvar="SANDBOX_API_KEY", show_envvar=True, help="The service's key.")
def terminal(session: str, command: str | None, url: str | None, api_key: str | None) -> None:
    """Use a terminal in a SESSION of a running service.

    It ends with its program, whose exit code becomes this command's; Ctrl-] leaves it at any time, which kills what runs in
    it. Exit code 3 is said when there is no such session or service.
    """
    from orchestrator import console
    from orchestrator.sdk import SandboxClient

    async def use() -> int:
        async with SandboxClient(url, api_key=api_key) as client:
            term = os.environ.get("TERM") or "dumb"
            end = await console.attach(client, session, command=command, term=term)
            return 0 if end is None else end.exit_code

    try:
        code = run_to_end(use())
    except SandboxError as error:
        fail(error.detail, NOT_RUN)
    raise click.exceptions.Exit(code)


@main.command()
@click.option("--engine", type=click.Choice(["docker", "local"]), help="In place of SANDBOX_ENGINE.")
@click.option("--format", "style", type=click.Choice(["pretty", "json"]), default="pretty", show_default=True)
def doctor(engine: str | None, style: str) -> None:
    """Tell what this host can isolate, item by item.

    At the end a real container is started, and what its self-test observed is listed layer by layer. The exit code is
    0 when sessions can be served with every layer that the engine requires, else 1.
    """
    from orchestrator import doctor as examination
    from orchestrator import log

    chosen = load(engine=engine)
    log.configure("error", chosen.log_format)
    try:
        report = run_to_end(examination.examine(chosen))
    except SandboxError as error:
        fail(error.detail, CODE_FAILED)
    click.echo(msgspec.json.encode(report) if style == "json" else examination.pretty(report))
    raise click.exceptions.Exit(0 if report.ok else CODE_FAILED)


@main.command("settings")
def show_settings() -> None:
    """List the settings: environment variables with their defaults, what they take and what they mean."""
    rows = settings.describe()
    width, default_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for variable, default, allowed, about in rows:
        click.echo(f"{variable:<{width}}  {default:<{default_width}}  {about} ({allowed})")


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
