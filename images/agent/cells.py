"""Runs inside the sandbox of a context: one cell after the other, in IPython's own shell.

Everything here happens in the user's reach; nothing outside trusts it. Imports happen in `/`, before
the sandbox is limited: nothing of the workspace can be in them.

A cell comes as 8 bytes of length and a marshalled dict. What goes out is records: a line `KIND NUMBER`,
where a `D` (display) and a `V` (value or error) announce so many bytes that follow, and `E CODE CELL` ends the cell.
"""

import _thread
import base64
import builtins
import contextlib
import fcntl
import getpass
import importlib
import json
import marshal
import os
import re
import signal
import subprocess
import sys
import types
import warnings

VALUE_FD, JOB_FD = 3, 4
OUT_OF_THE_WAY = 200  # our two descriptors move here: 3 and 4 are what a program expects to get first
READY = b"\n"
HEAD = 8  # bytes of the length before a cell
OWN_PID = os.getpid()
SHELL = "/bin/bash"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
BASE64 = {"image/png", "image/jpeg", "image/gif", "image/webp", "application/pdf"}
DEBIAN = "/usr/lib/python3/dist-packages"
NO_STDIN = "A context has no stdin: give the code what it is to read"
NO_SCREEN = "There is no screen: figures are shown by `%matplotlib inline`, which is the default"


def import_shell():
    """Return IPython's module of the shell, without its terminal and its completer: a third of the memory."""
    embed = types.ModuleType("IPython.terminal.embed")
    embed.embed = None
    sys.modules |= {"IPython.terminal.embed": embed, "jedi": None}
    try:
        from IPython.core import autocall, displayhook, displaypub, error, interactiveshell
    except ImportError as failure:
        sys.exit(f"this image has no IPython, which contexts need: {failure}")
    finally:
        del sys.modules["IPython.terminal.embed"], sys.modules["jedi"]
    return autocall, displayhook, displaypub, error, interactiveshell


class Records:
    """The way out: whole records, whatever interrupts or runs beside. What the user forked has none."""

    def __init__(self, fd):
        self._fd = fd
        self._lock = _thread.RLock()
        self._main = _thread.get_ident()
        self.writing = False  # and in the thread that an interrupt goes to
        self.interrupted = False

    def write(self, head, body=b""):
        """Write one record, after everything that was printed before it."""
        if os.getpid() != OWN_PID:
            return
        flush()
        with self._lock:
            self.writing = own = _thread.get_ident() == self._main
            try:
                data = memoryview(head.encode() + b"\n" + body)
                while data:
                    data = data[os.write(self._fd, data) :]
            finally:
                self.writing = False
        if own and self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt

    def show(self, data, metadata=None, *, main=False, transient=None, update=False):
        """Write a display: an object of MIME types and, without a slash in their names, facts about it."""
        item = {mime: text for mime, value in data.items() if (text := carried(mime, value)) is not None}
        if not item:
            return
        facts = {"main": main, "display_id": (transient or {}).get("display_id"), "update": update}
        facts["metadata"] = {mime: about for mime, about in (metadata or {}).items() if about and mime in item}
        item |= {name: text for name, fact in facts.items() if fact and (text := encoded(fact)) is not None}
        pairs = (f"{json.dumps(name)}:{text}" for name, text in item.items())
        body = ("{" + ",".join(pairs) + "}\n").encode()
        self.write(f"D {len(body)}", body)


def flush():
    """Let go of what a stream of the user's may hold back."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the user's code closed or replaced it
            stream.flush()


def carried(mime, value):
    """Return a display's data as JSON text, None when it cannot be carried; bytes as base64, as in a notebook."""
    if isinstance(value, bytes):
        value = base64.b64encode(value).decode()
    elif not mime.endswith("json") and not isinstance(value, str):
        value = str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()
        value = value.rstrip("\n") if mime in BASE64 else value
    return encoded(value)


def encoded(value, limit=None):
    """Return the value as JSON text, None when JSON cannot carry it or it is longer than the limit."""
    pieces, size = [], 0
    try:
        for piece in json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).iterencode(value):
            pieces.append(piece)
            size += len(piece.encode())
            if limit is not None and size > limit:
                return None
        return "".join(pieces)
    except Exception:  # the user's own classes may raise anything
        return None


class Interrupts:
    """SIGINT raises KeyboardInterrupt while a cell runs, and is nothing between two."""

    def __init__(self, records):
        self._records = records
        self.allowed = False

    def install(self):
        """Take the signal, whatever the last cell did with it."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, _number, _frame):
        if self.allowed and self._records.writing:
            self._records.interrupted = True
        elif self.allowed:
            raise KeyboardInterrupt


def make_shell(records):
    """Return IPython's shell, with our ways out for what it shows."""
    autocall, displayhook, displaypub, error, interactiveshell = import_shell()
    from traitlets import Type
    from traitlets.config import Config

    class Hook(displayhook.DisplayHook):
        """Shows the value of a last expression."""

        def start_displayhook(self):
            pass

        def write_output_prompt(self):
            pass

        def write_format_data(self, format_dict, md_dict=None):
            records.show(format_dict, md_dict, main=True)

        def finish_displayhook(self):
            pass

    class Publisher(displaypub.DisplayPublisher):
        """Shows what `display` is called with."""

        def publish(self, data, metadata=None, *_, transient=None, update=False, **__):
            records.show(data, metadata, transient=transient, update=update)

        def clear_output(self, *_, **__):
            pass

    class Shell(interactiveshell.InteractiveShell):
        """The shell without a terminal. `trace` is the last traceback that it showed."""

        displayhook_class = Type(Hook)
        display_pub_class = Type(Publisher)
        trace = ()

        def enable_gui(self, gui=None):
            if gui not in (None, "inline", "agg"):
                raise error.UsageError(NO_SCREEN)

        def system(self, cmd):
            """Run a shell command; its output goes where ours goes."""
            flush()
            command = self.var_expand(cmd, depth=1)
            code = subprocess.call([SHELL, "-c", command])
            self.user_ns["_exit_code"] = code

        def showtraceback(self, exc_tuple=None, *args, **kwargs):
            kind, failure, trace = exc_tuple or sys.exc_info()
            if isinstance(failure, SystemExit):
                return
            hide_own(trace)
            if isinstance(failure, KeyboardInterrupt) or kind.__name__ == "CancelledError":
                self._showtraceback(kind, failure, plain_trace(kind, failure, trace))
                return
            super().showtraceback((kind, failure, trace), *args, **kwargs)

        def _showtraceback(self, _etype, _evalue, stb):
            self.trace = [ANSI.sub("", str(line)) for line in stb]
            print("\n".join(self.trace), file=sys.stderr)

    class Exit(autocall.ExitAutocall):
        """Ends the cell, and leaves the context."""

        def __call__(self, code=None):
            raise SystemExit(code)

    def refuse_input(*_, **__):
        raise error.StdinNotImplementedError(NO_STDIN)

    builtins.input = getpass.getpass = refuse_input
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    shell = Shell.instance(ipython_dir="/tmp/.ipython", config=config)
    shell.display_formatter.active_types = shell.display_formatter.format_types
    shell.loop_runner = make_runner()
    shell.exiter = Exit(shell)
    for names in (shell.user_ns, shell.user_ns_hidden):
        names.update(exit=shell.exiter, quit=shell.exiter)
    warnings.filterwarnings("ignore", message="To exit: use")
    return shell


def hide_own(trace):
    """Cut a traceback where the user's code called ours, as at a signal."""
    own = hide_own.__code__.co_filename
    while trace is not None and trace.tb_next is not None:
        if trace.tb_next.tb_frame.f_code.co_filename == own != trace.tb_frame.f_code.co_filename:
            trace.tb_next = None
        trace = trace.tb_next


def plain_trace(kind, failure, trace):
    """Return the lines of an interrupt's traceback. IPython's own take long the first time, and the kill is near."""
    import traceback

    first = trace
    while first is not None and not first.tb_frame.f_code.co_filename.startswith("<ipython-input"):
        first = first.tb_next
    return [line.rstrip("\n") for line in traceback.format_exception(kind, failure, first or trace, chain=False)]


def make_runner():
    """Return what runs a cell with a top-level `await`: on one loop for all cells, left by an interrupt at once."""
    loop = None

    def run(coroutine):
        nonlocal loop
        import asyncio

        if loop is None or loop.is_closed():
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
        task = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
        result = loop.run_until_complete(task)  # IPython shows where the cell was
        if isinstance(result.error_in_exec, asyncio.CancelledError):
            result.error_in_exec = KeyboardInterrupt()
        return result

    return run


def boot():
    """Have the shell ready; return it with the ways in and out."""
    home = os.getcwd()
    os.chdir("/")  # the workspace is on no path before the sandbox is limited
    _thread.stack_size(1 << 20)  # as many threads as processes are allowed fit the data limit
    os.closerange(JOB_FD + 1, 64)
    value_fd, job_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY) for fd in (VALUE_FD, JOB_FD))
    os.closerange(VALUE_FD, JOB_FD + 1)
    sys.path.append(DEBIAN)
    # As a notebook does: figures are shown at a cell's end, and a program started from a cell draws without a screen.
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "SHELL": SHELL}
    records = Records(value_fd)
    interrupts = Interrupts(records)
    interrupts.install()
    shell = make_shell(records)
    os.write(value_fd, READY)
    os.chdir(home)
    major, minor = sys.version_info[:2]
    installed = f"{home}/.local/lib/python{major}.{minor}/site-packages"  # where pip puts a user's packages
    sys.path[:] = [home, *(path for path in sys.path if path and path != DEBIAN), installed, DEBIAN]
    sys.argv = [""]
    return shell, records, interrupts, job_fd


def read_cell(fd):
    """Return the next cell; the end of the process when there is none."""
    data = b""
    size = HEAD
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            os._exit(0)
        data += piece
        if size == HEAD == len(data):
            size += int.from_bytes(data, "big")
    return marshal.loads(data[HEAD:])


def run_cell(shell, interrupts, code):
    """Run one cell; return its value, or the exception that ended it."""
    interrupts.install()
    shell.trace = ()
    try:
        try:
            interrupts.allowed = True
            result = shell.run_cell(code, store_history=True)
        finally:
            interrupts.allowed = False
    except BaseException as failure:  # an interrupt, or code that IPython itself cannot stand
        interrupts.allowed = False
        return None, failure
    return result.result, result.error_before_exec or result.error_in_exec


def exit_code(failure):
    """Return the exit code that the interpreter would end with."""
    if not isinstance(failure, SystemExit):
        return 0 if failure is None else 1
    if failure.code is None or isinstance(failure.code, int):
        return (failure.code or 0) & 0xFF
    print(failure.code, file=sys.stderr)
    return 1


def report_of(shell, value, failure, limit):
    """Return value or error of a cell as JSON text; None when there is neither."""
    if failure is None:
        text = None if value is None else encoded(value, limit)
        return None if text is None else f'{{"value":{text}}}'
    try:
        message = str(failure)
    except BaseException:  # the user's own __str__ may raise anything
        message = "<exception str() failed>"
    trace = [line[: limit // 64] for line in shell.trace[:8]] + [line[: limit // 64] for line in shell.trace[8:][-8:]]
    facts = {"type": type(failure).__name__[:256], "message": message[: limit // 16], "stack_trace": trace}
    return '{"error":' + json.dumps(facts) + "}"


def serve(shell, records, interrupts, job_fd):
    """Run cells until there are no more."""
    first = True
    while True:
        cell = read_cell(job_fd)
        if first:
            os.environ |= cell["env"]
            first = False
        importlib.invalidate_caches()  # packages may have been installed since the cell before
        value, failure = run_cell(shell, interrupts, cell["code"])
        if os.getpid() != OWN_PID:  # forked by the cell: the next ones are not for it
            flush()
            os._exit(0)
        code = exit_code(failure)
        if (code or failure is None) and (report := report_of(shell, value, failure, cell["limit"])) is not None:
            body = report.encode("utf-8", "replace")
            records.write(f"V {len(body)}", body)
        value = failure = None
        records.interrupted = False
        records.write(f"E {code} {cell['number']}")


if __name__ == "__main__":
    serve(*boot())
