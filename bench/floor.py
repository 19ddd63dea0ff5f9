"""The floor C, run inside a container: our bwrap layout around a plain `python3 -c pass`, cold.

Prints one JSON object. Arguments: rounds of the serial measure, then width and seconds of the wide one.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, "/opt/sandbox/agent")
import seccomp
from layout import SECCOMP_FD, STATUS_FD, Layout

BWRAP = "/usr/bin/bwrap"
FILTER = Path("/scratch/floor.filter")


def command() -> list[str]:
    """Return the command of one cold sandbox."""
    layout = Layout(Path("/scratch"), Path("/workspace"), share_network=True)
    layout._numbers = 1 << 40  # apart from the agent's own
    words = layout.arguments(layout.make_scratch(), "bootstrap.pyc").decode().split("\0")[:-1]
    at = words.index("--json-status-fd")
    del words[at : at + 2]
    return [BWRAP, *words, "--", "/usr/bin/python3", "-c", "pass"]


def spawn(argv: list[str]) -> None:
    """Run one cold sandbox to its end."""
    fd = os.open(FILTER, os.O_RDONLY | os.O_CLOEXEC)
    pid = os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, fd, SECCOMP_FD)])
    os.close(fd)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("a cold sandbox failed")


def main() -> None:
    """Measure and print."""
    rounds, width, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    while (fd := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) <= STATUS_FD:
        pass
    os.close(fd)
    FILTER.write_bytes(seccomp.program(os.uname().machine))
    argv = command()
    spawn(argv)
    serial = []
    for _ in range(rounds):
        begun = time.perf_counter()
        spawn(argv)
        serial.append(time.perf_counter() - begun)
    plain = []
    for _ in range(rounds):
        begun = time.perf_counter()
        os.waitpid(os.posix_spawn("/usr/bin/python3", ["python3", "-I", "-S", "-c", "pass"], {}), 0)
        plain.append(time.perf_counter() - begun)
    done, until = [0] * width, time.perf_counter() + seconds

    def work(index: int) -> None:
        while time.perf_counter() < until:
            spawn(argv)
            done[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(width)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = sum(done) / (time.perf_counter() - begun)
    print(json.dumps({"serial_s": serial, "plain_s": plain, "wide_rate": rate}))


main()
