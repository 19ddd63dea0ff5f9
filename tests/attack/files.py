"""File cases: paths, links, archives and races at the doors through which files go in and out."""

import gzip
import io
import json
import select
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from tests.attack.after import Scene, quantile, watched
from tests.attack.cases import Case, NotApplicable, check
from tests.attack.live import Live
from tests.attack.web import MIB
from tests.attack.wire import Answer, chunked, exchange, request

BYTES_TYPE = "Content-Type: application/octet-stream"
TAR_TYPE = "Content-Type: application/x-tar"
PASSWD = b"root:x:0:0"
RSS_SLACK = 16 * MIB
STALLED_S = 60.0  # the client that stopped reading stays for so long
RACES, FEW_RACES = 500, 50
TEN_GIB = 10 << 30  # bytes of zeros that an archive promises
NO_CHANGE = "import os; print(sorted(n for n in os.listdir('/workspace') if n != 'kept'))"


def run(live: Live, case: Case, *, short: bool) -> None:
    """Send what the case describes; NotApplicable when the service has no such door."""
    with live.session() as sid:
        require_route(live, case, sid)
        with watched(Scene(live, sid, case)):
            since = live.log_size()
            if "setup_code" in case.payload:
                setup = live.execute(sid, case.payload["setup_code"])
                check(setup["outcome"] == "ok", f"the case could not be prepared: {setup['stderr'][-200:]}")
            ATTACKS[case.id](live, case, sid, short)
            faults = live.events("request_failed", since)
            check(not faults, f"{len(faults)} requests failed inside the service")
        live.is_usable(sid)


def require_route(live: Live, case: Case, sid: str) -> None:
    """Raise NotApplicable when a harmless request of the case's kind finds no route."""
    if "archive" in str(case.payload.get("path", "")):
        method, path, body = "POST", f"/v1/sessions/{sid}/archive", tar_of({"kept": b"x"})
        headers = [TAR_TYPE]
    else:
        method, path, body = "PUT", f"/v1/sessions/{sid}/files/kept", b"x"
        headers = [BYTES_TYPE]
    answer = exchange(live.port, [request(method, path, *headers, body=body)])
    if answer.status in (404, 405):
        raise NotApplicable(f"no such route: {method} {path.replace(sid, '{sid}')}")
    check(answer.status < 300, f"a harmless {method} was answered {answer.status}: {answer.body[:200]!r}")


def expect(case: Case, answer: Answer, about: str) -> None:
    """Check that the status is one of those that the case allows."""
    allowed = case.expect["http_status"]
    check(answer.status in allowed, f"{about[:120]}: {answer.status} instead of {allowed}: {answer.body[:200]!r}")


def put(live: Live, sid: str, written: str, body: bytes) -> Answer:
    """Upload a file to a path that is sent as it is written."""
    return exchange(live.port, [request("PUT", f"/v1/sessions/{sid}/files/{written}", BYTES_TYPE, body=body)])


def get(live: Live, sid: str, written: str, *headers: str) -> Answer:
    """Download a file."""
    return exchange(live.port, [request("GET", f"/v1/sessions/{sid}/files/{written}", *headers)])


def hostile_paths(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-01: a path is refused, or names a file below /workspace that comes back under the same name."""
    may_be_fine = {json.loads(f'"{path}"') for path in case.expect["allowed_ok"]} | set(case.expect["allowed_ok"])
    for path in case.payload["for_each_path"]:
        for written in {path, quote(path, safe="")}:
            answer = put(live, sid, written, b"x")
            if answer.status in (200, 201, 204) and path in may_be_fine:
                check(get(live, sid, written).body == b"x", f"{written!r} did not come back")
                found = live.execute(sid, f"print(open('/workspace/' + {path!r}).read())")
                check(found["stdout"] == "x\n", f"{written!r} is not below /workspace")
            else:
                expect(case, answer, repr(written))
    outside = live.execute(sid, "import os; print([p for p in ('/x','/tmp/x','/etc/x') if os.path.exists(p)])")
    check(outside["stdout"] == "[]\n", f"written outside /workspace: {outside['stdout']}")


def huge_upload(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-08: an upload without length is refused at the limit, not after it."""
    text, count = case.payload["body_repeat"]
    live.forget_peak()
    before = live.memory()
    head = request("PUT", f"/v1/sessions/{sid}/files/big", BYTES_TYPE, "Transfer-Encoding: chunked")
    pieces = chunked(text.encode() * MIB for _ in range(count // MIB))
    answer = exchange(live.port, [head, *pieces], timeout_s=120)
    expect(case, answer, "1 GiB")
    check(answer.sent < count / 2, f"{answer.sent >> 20} MiB were taken before the refusal")
    grown = live.memory("VmHWM") - before
    check(grown < RSS_SLACK, f"the orchestrator grew by {grown >> 20} MiB")
    left = live.execute(sid, NO_CHANGE)
    check(left["stdout"] == "[]\n", f"left of the refused upload: {left['stdout']}")


def archive_bombs(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-10: archives that are far larger unpacked, in bytes or in files."""
    many = io.BytesIO()
    with tarfile.open(fileobj=many, mode="w:gz", compresslevel=1) as tar:
        for number in range(20_000 if short else 200_000):
            tar.addfile(tarfile.TarInfo(str(number)))
    deep = io.BytesIO()
    with zipfile.ZipFile(deep, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", b"\0" * (256 * MIB))
    live.forget_peak()
    before = live.memory()
    for name, data in (("zeros", zeros_tar()), ("files", many.getvalue()), ("zip", deep.getvalue())):
        answer = exchange(
            live.port, [request("POST", f"/v1/sessions/{sid}/archive", TAR_TYPE, body=data)], timeout_s=120
        )
        expect(case, answer, name)
    grown = live.memory("VmHWM") - before
    check(grown < 4 * RSS_SLACK, f"the orchestrator grew by {grown >> 20} MiB")


def zeros_tar() -> bytes:
    """Return a tar, packed, whose one file is said to be of 10 GiB."""
    info = tarfile.TarInfo("zeros")
    info.size = TEN_GIB
    return gzip.compress(info.tobuf() + b"\0" * (64 * MIB), 9)


def hostile_archives(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-11: what an archive may not hold, each in an archive of its own."""
    for name, data in archives():
        answer = exchange(live.port, [request("POST", f"/v1/sessions/{sid}/archive", TAR_TYPE, body=data)])
        expect(case, answer, name)
    code = """
import os, stat
bad = [p for p in ('/x', '/etc/x', '/tmp/x') if os.path.lexists(p)]
for folder, names, files in os.walk('/workspace'):
    for name in names + files:
        mode = os.lstat(os.path.join(folder, name)).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or mode & 0o7000:
            bad.append((name, oct(mode)))
print(bad)
"""
    found = live.execute(sid, code)
    check(found["stdout"] == "[]\n", f"made by an archive: {found['stdout']}")


def archives() -> Iterator[tuple[str, bytes]]:
    """Yield hostile archives by name."""
    yield "a path that climbs", tar_of({"../x": b"x"})
    yield "an absolute path", tar_of({"/etc/x": b"x"})
    yield "a link, and a file behind it", tar_of({"a": ("link", "/"), "a/x": b"x"})
    yield "a hard link outwards", tar_of({"h": ("hard", "../../etc/passwd")})
    yield "a device", tar_of({"d": ("device", "")})
    yield "a set-user-id bit", tar_of({"s": ("setuid", "")})
    yield "one name twice", tar_of([("t", b"1"), ("t", ("link", "/etc/passwd")), ("t", b"2")])
    yield "a deep path", tar_of({"/".join(["d"] * 5000): b"x"})
    # CVE-2025-4517: links whose expansion exceeds PATH_MAX, so that realpath() stops short of the truth.
    long, entries, at = "d" * 247, [], ""
    for letter in "abcdefghijklmnop":
        entries += [(at + long, ("folder", "")), (at + letter, ("link", long))]
        at += long + "/"
    entries += [
        ("/".join("abcdefghijklmnop") + "/" + "l" * 254, ("link", "../" * 16)),
        ("escape", ("link", "l/../../x")),
    ]
    yield "a chain of long links", tar_of([*entries, ("escape/x", b"x")])


def tar_of(entries: dict[str, Any] | list[tuple[str, Any]]) -> bytes:
    """Return a tar of files (bytes) and of special entries (kind, target)."""
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "folder": tarfile.DIRTYPE}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, what in entries.items() if isinstance(entries, dict) else entries:
            info = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
                continue
            kind, info.linkname = what
            info.type = kinds.get(kind, tarfile.REGTYPE)
            info.mode = 0o4755 if kind == "setuid" else 0o755
            tar.addfile(info)
    return packed.getvalue()


def many_ranges(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-13: thousands of ranges are one answer, or none."""
    live.execute(sid, "open('/workspace/big','wb').write(bytes(1 << 20))")
    headers = [f"{name}: {value}" for name, value in case.payload["headers"].items()]
    answer = get(live, sid, "big", *headers)
    expect(case, answer, "ranges")
    check(len(answer.body) <= 2 * MIB, f"1 MiB became {len(answer.body)} bytes")


def followed_links(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-02: no download follows a link, and none hangs."""
    for step in case.payload["then"]:
        begun = time.monotonic()
        answer = exchange(live.port, [request(step["method"], step["path"].replace("{sid}", sid))])
        expect(case, answer, step["path"])
        check(PASSWD not in answer.body, "the content of a file outside came back")
        check(time.monotonic() - begun < 2, f"{step['path']} took {time.monotonic() - begun:.1f} s")


def written_links(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-03: no upload follows a link, least of all into the agent's own channel."""
    for step in case.payload["then"]:
        path = step["path"].replace("{sid}", sid)
        answer = exchange(live.port, [request(step["method"], path, BYTES_TYPE, body=step["body"].encode())])
        expect(case, answer, path)


def stopped_reader(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-05: a client that stops reading holds up nobody, and costs no memory."""
    live.forget_peak()
    before = live.memory()
    times: list[float] = []
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request("GET", f"/v1/sessions/{sid}/files/big"))
        check(connection.recv(1024), "nothing came at all")
        begun = time.monotonic()
        while time.monotonic() - begun < (5 if short else STALLED_S):
            asked = time.monotonic()
            live.is_usable(sid)
            check(get(live, sid, "kept").body == b"x", "another file could not be read meanwhile")
            times.append(time.monotonic() - asked)
            time.sleep(0.5)
        if not short:
            connection.setblocking(False)
            check(ended(connection), f"the transfer still stands after {STALLED_S:g} s")
    check(quantile(times, 0.9) < 1, f"others waited {max(times):.1f} s")
    grown = live.memory("VmHWM") - before
    check(grown < RSS_SLACK, f"the orchestrator grew by {grown >> 20} MiB")


def ended(connection: socket.socket) -> bool:
    """Read what is there; return whether the other side has ended the connection short of the file's size."""
    total = 0
    try:
        while select.select([connection], [], [], 2)[0]:
            piece = connection.recv(1 << 20)
            if not piece:
                return total < 15 * MIB
            total += len(piece)
    except ConnectionError:
        return True
    return False


def swapped(live: Live, case: Case, sid: str, short: bool) -> None:
    """file-06: a name that becomes a file, a link and a directory in turn never leads outside."""
    racer = threading.Thread(target=live.execute, args=(sid, case.payload["race"]), kwargs={"timeout_s": 60})
    passwd = live.execute(sid, "print(open('/etc/passwd').read())")["stdout"]
    racer.start()
    try:
        for step in case.payload["then"]:
            for _ in range(FEW_RACES if short else RACES):
                body = step["body"].encode() if "body" in step else None
                kind = [BYTES_TYPE] if body is not None else []
                path = step["path"].replace("{sid}", sid)
                answer = exchange(live.port, [request(step["method"], path, *kind, body=body)])
                expect(case, answer, path)
                check(PASSWD not in answer.body, "the content of /etc/passwd came back")
    finally:
        for execution in live.client.get(f"/v1/sessions/{sid}/executions").json()["executions"]:
            live.client.delete(f"/v1/sessions/{sid}/executions/{execution['id']}")
        racer.join()
    check(live.execute(sid, "print(open('/etc/passwd').read())")["stdout"] == passwd, "/etc/passwd was written")


Attack = Callable[[Live, Case, str, bool], None]
ATTACKS: dict[str, Attack] = {
    "file-01": hostile_paths,
    "file-02": followed_links,
    "file-03": written_links,
    "file-05": stopped_reader,
    "file-06": swapped,
    "file-08": huge_upload,
    "file-10": archive_bombs,
    "file-11": hostile_archives,
    "file-13": many_ranges,
}
