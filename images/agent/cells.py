"""Runs inside the sandbox of a context: one cell after the other, in the shell of `interactive.py`.

Everything here happens in the user's reach; nothing outside trusts it. Imports happen in `/`, before
the sandbox is limited: nothing of the workspace can be in them.

A cell comes as 8 bytes of length and a marshalled dict. What goes out is the records of `records.py`.
"""

import _thread
import fcntl
import importlib
import json
import marshal
import os
import signal
import sys

from interactive import SHELL, make_shell
from records import OWN_PID, Records, encoded, flush

VALUE_FD, JOB_FD = 3, 4
OUT_OF_THE_WAY = 200  # our two descriptors move here: 3 and 4 are what a program expects to get first
READY = b"\n"
HEAD = 8  # bytes of the length before a cell
DEBIAN = "/usr/lib/python3/dist-packages"


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


def boot():
    """Have the shell ready; return it with the ways in and out."""
    home = os.getcwd()
    os.chdir("/")  # the workspace is on no path before the sandbox is limited
    step_aside()
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


def step_aside():
    """Take our directory off the path, and our modules out of the table: the user may have some of the same names."""
    del sys.path[0], sys.modules["interactive"], sys.modules["records"]


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
