"""Inside the sandbox of a context: IPython's own shell, without a terminal, with our ways out for what it shows."""

import builtins
import getpass
import os
import re
import subprocess
import sys
import types
import warnings

from records import flush

SHELL = "/bin/bash"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NO_STDIN = "A context has no stdin: give the code what it is to read"
NO_SCREEN = "There is no screen: figures are shown by `%matplotlib inline`, which is the default"


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


def hide_own(trace):
    """Cut a traceback where the user's code called ours, as at a signal."""
    while trace is not None and trace.tb_next is not None:
        if is_own(trace.tb_next) and not is_own(trace):
            trace.tb_next = None
        trace = trace.tb_next


def is_own(trace):
    """Tell whether a traceback begins in code of ours: it was compiled from a file beside this one."""
    own, other = is_own.__code__.co_filename, trace.tb_frame.f_code.co_filename
    return os.path.dirname(other) == os.path.dirname(own)


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
