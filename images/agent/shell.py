"""Becomes the program of a terminal. Runs in a sandbox, as the code of a job."""

import os
import signal
import sys

FIRST_OTHER, PAST_OTHERS = 3, 64  # descriptors beside stdin, stdout and stderr


def become(tty: str, argv: list[str]) -> None:
    """Take the terminal as the controlling one, and become the program; exit as a shell would when that fails."""
    os.setsid()
    fd = os.open(tty, os.O_RDWR)  # a leader of a session that has no terminal gets the one that it opens
    for standard in (0, 1, 2):
        os.dup2(fd, standard)
    os.closerange(FIRST_OTHER, PAST_OTHERS)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which an interpreter ignores, and its heirs would
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except (OSError, ValueError) as error:
        print(f"{argv[0]}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)
