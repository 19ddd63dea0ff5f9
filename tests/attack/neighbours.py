"""Sessions beside each other: what one does is neither seen nor felt in another."""

import secrets
import threading
import time

from tests.attack.after import quantile
from tests.attack.cases import check, load
from tests.attack.live import Json, Live, serve

NOISE = (
    "import os\nfor _ in range(os.cpu_count() - 1):\n    if os.fork() == 0: break\nwhile True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "import mmap\nx=[]\nwhile True:\n    m=mmap.mmap(-1,1<<20); m.write(b'x'*(1<<20)); x.append(m)",
)
FIND = """
import os
found = []
for root in ('/workspace', '/tmp', '/dev/shm', '/run', '/var', '/home', '/scratch'):
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            try:
                if {secret!r} in open(path, errors='replace').read(): found.append(path)
            except OSError: pass
found += [key for key, value in os.environ.items() if {secret!r} in value]
print(found)
"""


def inotify(live: Live, short: bool) -> None:
    """shr-03: one session's instances of inotify are not taken from another's quota."""
    hog = next(case for case in load() if case.id == "shr-03").payload["code_a"]
    one = "import ctypes; l=ctypes.CDLL(None,use_errno=True); print(l.inotify_init1(0) >= 0, ctypes.get_errno())"
    with live.session() as first, live.session() as second:
        thread = threading.Thread(target=live.execute, args=(first, hog), kwargs={"timeout_s": 4})
        thread.start()
        time.sleep(1)
        told = live.execute(second, one)
        thread.join()
        check(told["stdout"].startswith("True"), f"the other session got none: {told['stdout']} {told['stderr']}")


def secrets_kept(live: Live, short: bool) -> None:
    """shr-04: nothing that one session writes is found in another, nor after it."""
    secret = secrets.token_hex(16)
    write = f"for p in ('/workspace/secret','/tmp/secret','/dev/shm/secret'): open(p,'w').write({secret!r})"
    with live.session(env={"SECRET": secret}) as first, live.session() as second:
        live.execute(first, write)
        live.execute(first, "import time; time.sleep(0.2)")
        told = live.execute(second, FIND.format(secret=secret), timeout_s=20)
        check(told["stdout"] == "[]\n", f"found beside it: {told['stdout']} {told['stderr'][-200:]}")
    for _ in range(int(live.pool()["target"]) + 2):  # wherever the next ones are
        with live.session() as third:
            told = live.execute(third, FIND.format(secret=secret), timeout_s=20)
            check(told["stdout"] == "[]\n", f"found after it: {told['stdout']}")


def fresh_scratch(live: Live, short: bool) -> None:
    """shr-05: /tmp and /dev/shm are new in every execution, the workspace stays."""
    write = (
        "import socket\nfor p in ('/tmp/x','/dev/shm/x','/workspace/x'): open(p,'w').write('x')\n"
        "s=socket.socket(socket.AF_UNIX); s.bind('/workspace/s'); s.listen()"
    )
    look = "import os; print(os.listdir('/tmp'), os.listdir('/dev/shm'), sorted(os.listdir('/workspace')))"
    with live.session() as sid:
        for _ in range(5):
            live.execute(sid, write)
            told = live.execute(sid, look)
            check(told["stdout"] == "[] [] ['s', 'x']\n", f"left: {told['stdout']} {told['stderr'][-200:]}")
            live.execute(sid, "import os; os.unlink('/workspace/s')")


def noise(live: Live, short: bool) -> str:
    """shr-06: busy loops, fork bombs and memory bombs beside a session do not slow it down beyond a second."""
    count, rounds = (3, 20) if short else (8, 50)
    seconds = 6 if short else 20
    with serve(pool_size=2) as own, own.session() as quiet:
        sids = [own.open() for _ in range(count)]
        over = threading.Event()

        def disturb(sid: str, code: str) -> None:
            while not over.is_set():
                own.execute(sid, code, timeout_s=seconds)

        threads = [
            threading.Thread(target=disturb, args=(sid, NOISE[number % len(NOISE)])) for number, sid in enumerate(sids)
        ]
        for thread in threads:
            thread.start()
        times: list[float] = []
        wrong: list[Json] = []
        try:
            time.sleep(0.5)
            for _ in range(rounds):
                begun = time.monotonic()
                told = own.execute(quiet, "print(1)", timeout_s=20)
                times.append(time.monotonic() - begun)
                wrong += [told] if (told["outcome"], told["stdout"]) != ("ok", "1\n") else []
        finally:
            over.set()
            for thread in threads:
                thread.join()
        check(not wrong, f"{len(wrong)} executions failed: {wrong[:1]}")
        late = quantile(times, 0.99)
        check(late < 1, f"p99 {late:.2f} s, p50 {quantile(times, 0.5):.2f} s beside {count} noisy sessions")
    return f"p50 {quantile(times, 0.5) * 1000:.0f} ms, p99 {late * 1000:.0f} ms beside {count} noisy sessions"
