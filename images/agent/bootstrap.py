"""Runs inside the sandbox: waits for one job, runs it, reports its value.

Everything here happens in the user's reach; nothing outside trusts it. Imports cost CPU at every
boot, so only what is compiled into the interpreter is imported ahead: `os` alone would be a tenth.
"""

import _thread
import atexit
import builtins
import marshal
import posix
import sys
import time

VALUE_FD, JOB_FD = 3, 4
MAIN = "main.py"
READY = b"\n"
TRACE_LIMIT = 1000
OWN_PID = posix.getpid()


class Context:
    """AWS Lambda's context object (docs.aws.amazon.com/lambda, "Python context object")."""

    identity = None
    client_context = None

    def __init__(self, facts):
        self._deadline = facts.pop("deadline")
        self.__dict__.update(facts)

    def get_remaining_time_in_millis(self):
        """Return the milliseconds left until the execution's timeout, never below 0."""
        return max(0, int((self._deadline - time.monotonic()) * 1000))

    def log(self, message):
        """Write to the log, which is stdout."""
        print(message)


class RuntimeFault(Exception):
    """An error of the handler's contract, with the type that Lambda gives it."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


def boot():
    """Wait for the job. The launcher has limited this process before it hands the job over."""
    _thread.stack_size(1 << 20)  # as many threads as processes are allowed fit the data limit
    posix.closerange(JOB_FD + 1, 64)
    import_site_builtins()
    warm_up()
    workspace = posix.getcwd()  # nothing is imported from there before the job comes
    major, minor = sys.version_info[:2]
    installed = f"{workspace}/.local/lib/python{major}.{minor}/site-packages"  # where pip puts a user's packages
    sys.path[:0] = [workspace]
    sys.path += [installed, "/usr/lib/python3/dist-packages"]
    posix.write(VALUE_FD, READY)
    chunks = []
    while chunk := posix.read(JOB_FD, 65536):
        chunks.append(chunk)
    posix.close(JOB_FD)
    if not chunks:
        posix._exit(0)  # the launcher gave this sandbox up
    return marshal.loads(b"".join(chunks))


def warm_up():
    """Touch what every job needs: memory that is first used while a client waits costs it a millisecond."""
    namespace = {}
    exec(
        compile("def handler(event, context=None):\n    return {'n': [event, 1.5, 'text']}\n", MAIN, "exec"), namespace
    )
    encode(call(namespace["handler"], {"event": None, "context": {}, "deadline": 0.0}))
    posix.listdir("/dev/fd")


def run(job):
    """Run the job, return the exit code."""
    for name, value in job["env"].items():
        posix.putenv(name, value)
        posix.environ[name.encode()] = value.encode("utf-8", "surrogateescape")  # what `os` will start from
    return run_command(job["argv"]) if job["argv"] else run_python(job)


def run_command(argv):
    """Become the command; return a shell's exit code when that fails."""
    import _signal  # type: ignore[import-not-found]  # `signal` itself costs an import of enum
    import os

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # which Python ignores: `yes | head` is to end
        _signal.signal(number, _signal.SIG_DFL)
    os.set_inheritable(VALUE_FD, False)
    try:
        os.execvp(argv[0], argv)
    except (OSError, ValueError) as error:
        print(f"{argv[0]}: {getattr(error, 'strerror', error)}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def run_python(job):
    """Run Python code, then its handler if it has one."""
    sys.argv = [MAIN, *job["args"]]
    main = sys.modules["__main__"] = type(sys)("__main__")
    namespace = main.__dict__
    namespace.update(__builtins__=builtins, __file__=MAIN)
    code = 0
    try:
        if job["code"] is not None:
            exec(compile(job["code"], MAIN, "exec", dont_inherit=True), namespace)
        handler = find_handler(job, namespace)
        if handler is not None:
            report(b'{"value":', encode(call(handler, job)))
    except SystemExit as error:
        code = exit_code(error.code)
    except BaseException as error:  # the boundary of the user's code: whatever it raised is its result
        code = 1
        report_error(error, job["code"])
    return finish(namespace, code)


def find_handler(job, namespace):
    """Return the handler, None for a script; it may be `module.function` of a workspace file."""
    name = job["handler"]
    if name is None:
        handler = namespace.get("handler")
        return handler if callable(handler) else None
    owner, _, function = name.rpartition(".")
    if owner:
        try:
            __import__(owner)
        except ImportError as error:
            raise RuntimeFault("Runtime.ImportModuleError", f"Unable to import module '{owner}': {error}") from error
        namespace = sys.modules[owner].__dict__
    if not callable(handler := namespace.get(function)):
        place = f"module '{owner}'" if owner else "the code"
        raise RuntimeFault("Runtime.HandlerNotFound", f"Handler '{function}' missing in {place}")
    return handler


def call(handler, job):
    """Call the handler with the event, and with the context when it takes two arguments."""
    arguments = [job["event"]]
    if takes_context(handler):
        arguments.append(Context(dict(job["context"], deadline=job["deadline"])))
    value = handler(*arguments)
    if hasattr(value, "__await__"):
        import asyncio

        async def wait():
            return await value

        value = asyncio.run(wait())
    return value


def takes_context(handler):
    """Tell whether the handler takes a second argument; a decorator's `*args` stand for what it wraps."""
    while (inner := getattr(handler, "__wrapped__", None)) is not None:
        handler = inner
    code = getattr(handler, "__code__", None)
    if code is None or hasattr(handler, "__self__"):
        import inspect

        try:
            inspect.signature(handler).bind(None, None)
        except (TypeError, ValueError):
            return False
        return True
    return code.co_argcount >= 2 or bool(code.co_flags & 0x04)  # 0x04: CO_VARARGS


def encode(value):
    """Return the value as JSON."""
    try:
        return json_encoder()(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RuntimeFault("Runtime.MarshalError", f"Unable to marshal response: {error}") from None


def json_encoder():
    """Return a function from values to JSON text.

    `_json` is the part of `json` that is written in C; importing `json` itself would cost as much
    as the whole boot. Where an interpreter has it otherwise, `json` serves.
    """
    try:
        from _json import encode_basestring_ascii, make_encoder

        pieces = make_encoder({}, unserializable, encode_basestring_ascii, None, ":", ",", False, False, False)
    except (ImportError, TypeError):
        import json

        return json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
    return lambda value: "".join(pieces(value, 0))


def unserializable(value):
    """Refuse a value that JSON cannot carry, in the words of `json`."""
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def exit_code(code):
    """Return the exit code of SystemExit's argument, as the interpreter itself would."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def report(head, body):
    """Write the one report of this job: a JSON object of its value or its error. What the user forked has none."""
    if posix.getpid() != OWN_PID:
        return
    data = head + body + b"}"
    while data:
        data = data[posix.write(VALUE_FD, data) :]


def report_error(error, source):
    """Print the traceback of the user's frames, and report type, message and stack trace."""
    import linecache
    import traceback

    own = boot.__code__.co_filename
    if isinstance(source, str):
        linecache.cache[MAIN] = (len(source), None, source.splitlines(keepends=True), MAIN)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == own:
        trace = trace.tb_next
    trace = last_frames(trace)
    if isinstance(error, RuntimeFault):
        kind, stack = error.kind, []
        print(f"{kind}: {error}", file=sys.stderr)
    else:
        kind = type(error).__name__
        stack = traceback.format_list([frame for frame in traceback.extract_tb(trace) if frame.filename != own])
        try:
            traceback.print_exception(type(error), error, trace)
        except (OSError, ValueError, AttributeError):
            pass  # the user's code closed or replaced stderr
    try:
        message = str(error)
    except BaseException:  # the user's own __str__ may raise anything
        message = "<exception str() failed>"
    facts = {"type": kind, "message": message, "stack_trace": stack}
    report(b'{"error":', encode(facts))


def last_frames(trace):
    """Return a traceback's last frames, as many as the interpreter shows: a deep recursion has a million."""
    frames, end = 0, trace
    while end is not None:
        frames, end = frames + 1, end.tb_next
    for _ in range(frames - TRACE_LIMIT):
        trace = trace.tb_next
    return trace


def finish(namespace, code):
    """End as the interpreter would (threads, exit handlers, destructors, open files), but faster."""
    try:
        if (threading := sys.modules.get("threading")) is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        namespace.clear()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the user's destructors and streams
        pass
    if len(posix.listdir("/dev/fd")) > VALUE_FD + 2:  # a file may hold unwritten data: finalize in full
        return code
    posix._exit(code)


def import_site_builtins():
    """Give scripts the names that `site` adds, which `-S` leaves out."""
    import _sitebuiltins

    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    builtins.help = _sitebuiltins._Helper()


if __name__ == "__main__":
    sys.exit(run(boot()))
