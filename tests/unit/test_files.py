"""Files of a session over HTTP, on the local engine: the real agent, its streams, its sandboxes."""

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import packing
from tests.live import Live


@pytest.fixture(scope="module")
def sid(local_service: Live) -> Iterator[str]:
    """A session that the tests of this module share."""
    session = local_service.client.post("/v1/sessions", json={}).json()["id"]
    yield session
    local_service.client.delete(f"/v1/sessions/{session}")


@pytest.fixture
def url(sid: str) -> str:
    """Where the session's files are."""
    return f"/v1/sessions/{sid}/files"


def run(client: httpx.Client, sid: str, code: str) -> dict[str, Any]:
    """Execute code that must succeed."""
    execution: dict[str, Any] = client.post(f"/v1/sessions/{sid}/executions", json={"code": code}).json()
    assert execution["outcome"] == "ok", execution["stderr"]
    return execution


def tar_of(**files: bytes) -> bytes:
    """Return a tar of files; two underscores in a name stand for a slash."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("__", "/"))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def test_what_is_written_is_read_by_code_and_by_the_client(client: httpx.Client, sid: str, url: str) -> None:
    data = bytes(range(256)) * 5000
    written = client.put(f"{url}/deep/er/data.bin", content=data)
    assert (201, "file", len(data)) == (written.status_code, written.json()["type"], written.json()["size_bytes"])
    assert (
        "True" in run(client, sid, "print(open('deep/er/data.bin','rb').read() == bytes(range(256)) * 5000)")["stdout"]
    )
    assert data == client.get(f"{url}/deep/er/data.bin").content


def test_an_empty_file_is_a_file(client: httpx.Client, url: str) -> None:
    assert client.put(f"{url}/empty", content=b"").json()["size_bytes"] == 0
    answer = client.get(f"{url}/empty")
    assert (200, b"", "0") == (answer.status_code, answer.content, answer.headers["content-length"])


def test_a_name_that_is_no_ascii_comes_back_the_same(client: httpx.Client, url: str) -> None:
    name = "Bücher 书 \u202e -rf"
    assert client.put(f"{url}/odd/{name}", content=b"x").status_code == 201
    assert [f"odd/{name}"] == [file["path"] for file in client.get(url, params={"path": "odd"}).json()["files"]]
    assert client.get(f"{url}/odd/{name}").content == b"x"


@pytest.mark.parametrize(
    ("wanted", "status", "content", "said"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, None),
        ("bytes=-0", 416, None, None),
        ("bytes=4-2", 200, b"0123456789", None),
        ("bytes=0-0,2-2", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
    ],
)
def test_a_range_is_a_part_of_the_file(
    client: httpx.Client, url: str, wanted: str, status: int, content: bytes | None, said: str | None
) -> None:
    client.put(f"{url}/ten", content=b"0123456789")
    answer = client.get(f"{url}/ten", headers={"Range": wanted})
    assert (status, said) == (answer.status_code, answer.headers.get("content-range"))
    if content is not None:
        assert content == answer.content


def test_head_tells_what_a_path_is(client: httpx.Client, url: str) -> None:
    client.put(f"{url}/what/five", content=b"12345")
    answer = client.head(f"{url}/what/five")
    assert ("5", "file") == (answer.headers["content-length"], answer.headers["x-file-type"])
    assert client.head(f"{url}/what").headers["x-file-type"] == "directory"
    assert client.head(f"{url}/nowhere").status_code == 404


def test_a_list_is_paged_in_the_order_of_the_paths(client: httpx.Client, url: str) -> None:
    for name in ("c", "a", "b/1", "b/2"):
        client.put(f"{url}/listed/{name}", content=b"x")
    first = client.get(url, params={"path": "listed", "recursive": "true", "limit": 3}).json()
    assert ["listed/a", "listed/b", "listed/b/1"] == [file["path"] for file in first["files"]]
    rest = client.get(url, params={"path": "listed", "recursive": "true", "after": first["next"]}).json()
    assert (["listed/b/2", "listed/c"], None) == ([file["path"] for file in rest["files"]], rest["next"])
    flat = client.get(url, params={"path": "listed"}).json()["files"]
    assert ["file", "directory", "file"] == [file["type"] for file in flat]


def test_directories_are_made_moved_and_deleted(client: httpx.Client, url: str) -> None:
    assert client.post(f"{url}/one/two", json={"type": "directory"}).json()["type"] == "directory"
    client.put(f"{url}/one/two/file", content=b"x")
    assert client.patch(f"{url}/one/two", json={"path": "else/where"}).json()["path"] == "else/where"
    assert client.get(f"{url}/else/where/file").content == b"x"
    assert client.delete(f"{url}/else").json()["code"] == "file_conflict"
    assert client.delete(f"{url}/else", params={"recursive": "true"}).status_code == 204
    assert client.get(url, params={"path": "else"}).json()["code"] == "file_not_found"


def test_a_move_replaces_only_when_told(client: httpx.Client, url: str) -> None:
    client.put(f"{url}/from", content=b"new")
    client.put(f"{url}/to", content=b"old")
    assert client.patch(f"{url}/from", json={"path": "to"}).json()["code"] == "file_conflict"
    assert client.patch(f"{url}/from", json={"path": "to", "overwrite": True}).status_code == 200
    assert client.get(f"{url}/to").content == b"new"


PATHS = [
    ("%2e%2e/x", 400, "invalid_path"),
    ("..%2fx", 400, "invalid_path"),
    ("..%252fx", 400, "invalid_path"),
    ("/etc/passwd", 400, "invalid_path"),
    ("a//b", 400, "invalid_path"),
    ("a/%2e/b", 400, "invalid_path"),
    ("%20", 400, "invalid_path"),
    ("a%00b", 400, "invalid_path"),
    ("a%0ab", 400, "invalid_path"),
    ("%ff", 400, "invalid_path"),
    ("n" * 256, 400, "invalid_path"),
    ("/".join(["d"] * 33), 400, "invalid_path"),
    ("missing", 404, "file_not_found"),
    ("missing/below", 404, "file_not_found"),
    ("directory", 409, "file_conflict"),
    ("plain/below", 409, "file_conflict"),
    ("link", 409, "file_conflict"),
    ("links/passwd", 409, "file_conflict"),
    ("twice", 409, "file_conflict"),
    ("pipe", 409, "file_conflict"),
    ("locked/x", 403, "file_denied"),
]


@pytest.mark.parametrize(("path", "status", "code"), PATHS)
def test_a_path_that_cannot_be_read_says_why(
    local_service: Live, sid: str, url: str, path: str, status: int, code: str
) -> None:
    client = local_service.client
    run(
        client,
        sid,
        "import os\nos.makedirs('directory', exist_ok=True); open('plain','w').close(); os.makedirs('locked', exist_ok=True)\n"
        "for make, name in ((lambda: os.symlink('/etc/passwd','link'),'link'), (lambda: os.symlink('/etc','links'),'links'),\n"
        "    (lambda: os.link('plain','twice'),'twice'), (lambda: os.mkfifo('pipe'),'pipe')):\n"
        "    os.path.lexists(name) or make()\n"
        "os.chmod('locked', 0)",
    )
    # Sent as it is written: a client of a library would tidy it up.
    answer = client.send(httpx.Request("GET", f"{local_service.url}{url}/{path}", headers={"Host": "localhost"}))
    assert (status, code) == (answer.status_code, answer.json()["code"])


@pytest.mark.parametrize("path", ["directory", "link", "links/x", "pipe", "twice"])
def test_nothing_is_written_through_what_is_no_plain_file(client: httpx.Client, sid: str, url: str, path: str) -> None:
    run(
        client,
        sid,
        "import os\nos.makedirs('directory', exist_ok=True); open('plain','w').close()\n"
        "for make, name in ((lambda: os.symlink('/proc/1/fd/1','link'),'link'), (lambda: os.symlink('/tmp','links'),'links'),\n"
        "    (lambda: os.link('plain','twice'),'twice'), (lambda: os.mkfifo('pipe'),'pipe')):\n"
        "    os.path.lexists(name) or make()",
    )
    assert client.put(f"{url}/{path}", content=b"x").json()["code"] == "file_conflict"
    left = run(client, sid, "import os; print([n for n in os.listdir() if n.endswith('.part')])")
    assert left["stdout"] == "[]\n"


def test_a_file_above_the_limit_is_refused_before_and_while_it_comes(client: httpx.Client, url: str) -> None:
    size = 65 << 20
    announced = client.put(f"{url}/big", content=bytes(size))
    assert (413, "file_too_large") == (announced.status_code, announced.json()["code"])

    def chunks() -> Iterator[bytes]:
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    streamed = client.put(f"{url}/big", content=chunks())
    assert (413, "file_too_large") == (streamed.status_code, streamed.json()["code"])
    assert client.head(f"{url}/big").status_code == 404


def test_of_an_upload_that_breaks_off_nothing_is_left(local_service: Live, sid: str, url: str) -> None:
    broken = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield bytes(1 << 20)
        broken.set()
        raise InterruptedError

    with httpx.Client(base_url=local_service.url) as client, pytest.raises(InterruptedError):
        client.put(f"{url}/half", content=chunks())
    assert broken.is_set()
    code = "import os, time\nwhile any(n.endswith('.part') for n in os.listdir()): time.sleep(0.01)\nprint(os.path.exists('half'))"
    assert run(local_service.client, sid, code)["stdout"] == "False\n"


def test_an_archive_comes_back_as_it_went_in(client: httpx.Client, sid: str) -> None:
    run(
        client,
        sid,
        "import os; os.makedirs('packed/sub'); open('packed/sub/f','w').write('x'*99999); os.symlink('sub/f','packed/l')",
    )
    archive = client.get(f"/v1/sessions/{sid}/archive", params={"path": "packed"})
    assert archive.headers["content-type"] == "application/x-tar"
    for content in (archive.content, gzip.compress(archive.content)):
        answer = client.post(f"/v1/sessions/{sid}/archive", params={"path": "again"}, content=content)
        assert {"files": 2} == answer.json()
    told = run(client, sid, "import os; print(len(open('again/l').read()), os.readlink('again/l'))")
    assert told["stdout"] == "99999 sub/f\n"


def test_a_file_that_becomes_a_pipe_while_it_is_packed_is_left_out(tmp_path: Path) -> None:
    """Opening a pipe waits for who writes to it."""
    place = tmp_path / "f"
    place.write_text("x")

    class Late(tarfile.TarFile):
        def gettarinfo(self, *names: Any, **more: Any) -> tarfile.TarInfo:
            entry = super().gettarinfo(*names, **more)
            place.unlink()
            os.mkfifo(place)
            return entry

    with Late.open(tmp_path / "tar", "w") as tar:
        packing.add(tar, str(place), str(tmp_path))
        assert tar.getnames() == []


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> bytes:
    """Return a tar with one good file and one entry that is not."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        good = tarfile.TarInfo("good")
        tar.addfile(good)
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname, bad.mode = kind, target, mode
        tar.addfile(bad)
    return packed.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        b"no tar",
        b"",
        tar_of(a=b"x")[:700],
        gzip.compress(tar_of(a=b"x" * 9999))[:40],
        entry("../x"),
        entry("/etc/x"),
        entry("good"),
        entry("good/below"),
        entry("l", tarfile.SYMTYPE, "/etc"),
        entry("a/l", tarfile.SYMTYPE, "../../x"),
        entry("h", tarfile.LNKTYPE, "good"),
        entry("d", tarfile.CHRTYPE),
        entry("f", tarfile.FIFOTYPE),
        entry("s", mode=0o4755),
        entry("/".join(["d"] * 40)),
        entry("n" * 300),
    ],
)
def test_an_archive_that_holds_what_it_may_not_leaves_nothing(client: httpx.Client, sid: str, archive: bytes) -> None:
    answer = client.post(f"/v1/sessions/{sid}/archive", params={"path": "refused"}, content=archive)
    assert (422, "invalid_archive") == (answer.status_code, answer.json()["code"])
    told = run(client, sid, "import os; print([n for n in os.listdir() if n == 'refused' or n.endswith('.part')])")
    assert told["stdout"] == "[]\n"


def test_an_execution_names_what_it_made_and_changed(client: httpx.Client, sid: str, url: str) -> None:
    client.put(f"{url}/art/kept", content=b"x")
    client.put(f"{url}/art/changed", content=b"x")
    made = run(client, sid, "open('art/changed','a').write('y'); open('art/made','w').write('abc')")
    assert [("art/changed", 2), ("art/made", 3)] == sorted((a["path"], a["size_bytes"]) for a in made["artifacts"])
    assert run(client, sid, "open('art/kept').read()")["artifacts"] == []


def test_a_thousand_artifacts_are_named_and_more_are_truncated(client: httpx.Client, sid: str) -> None:
    made = run(client, sid, "import os; os.mkdir('many'); [open(f'many/{n}','w').close() for n in range(1001)]")
    assert (1000, ["artifact"]) == (len(made["artifacts"]), made["truncated"])
    client.delete(f"/v1/sessions/{sid}/files/many", params={"recursive": "true"})


def test_files_come_with_an_execution(client: httpx.Client, sid: str) -> None:
    files = {"with/text": "héllo", "with/bytes": {"base64": "AP8="}}
    code = "print(open('with/text').read(), open('with/bytes','rb').read())"
    execution = client.post(f"/v1/sessions/{sid}/executions", json={"code": code, "files": files}).json()
    assert (execution["stdout"], execution["artifacts"]) == ("héllo b'\\x00\\xff'\n", [])


@pytest.mark.parametrize(
    ("files", "status"),
    [({"../x": "x"}, 400), ({"a": 5}, 400), ({"a": {"base64": "?"}}, 400), ({"a": {"text": "x"}}, 400), (["a"], 400)],
)
def test_files_that_cannot_be_are_refused_and_nothing_runs(
    client: httpx.Client, sid: str, files: Any, status: int
) -> None:
    before = client.get(f"/v1/sessions/{sid}").json()["executions"]
    answer = client.post(f"/v1/sessions/{sid}/executions", json={"code": "1", "files": files})
    assert (status, before) == (answer.status_code, client.get(f"/v1/sessions/{sid}").json()["executions"])


def test_a_one_shot_takes_files_and_gives_what_it_made(client: httpx.Client) -> None:
    body = {
        "code": "d = open('in').read()\nopen('out','w').write(d.upper())\nopen('big','wb').write(bytes(9 << 20))",
        "files": {"in": "abc"},
    }
    execution = client.post("/v1/execute", json=body).json()
    assert [("big", None), ("out", "QUJD")] == sorted((a["path"], a["base64"]) for a in execution["artifacts"])


def test_the_seeds_routes_for_files(client: httpx.Client) -> None:
    base = "/workspace/se"
    client.post(f"{base}/session/seedfiles")
    uploaded = client.post(f"{base}/upload/seedfiles?filename=in/a.txt", files={"file": ("x.txt", b"hello")})
    assert {"filename": "in/a.txt", "size": 5} == uploaded.json()
    assert {"filename": "own.txt", "size": 2} == client.post(
        f"{base}/upload/seedfiles", files={"file": ("own.txt", b"hi")}
    ).json()
    assert client.get(f"{base}/download/seedfiles/in/a.txt").content == b"hello"
    assert {"filename": "t", "size": 3} == client.post(
        f"{base}/create/seedfiles", json={"content": "abc", "filename": "t", "mode": "w"}
    ).json()
    appended = client.post(f"{base}/create/seedfiles", json={"content": "d", "filename": "t", "mode": "a"})
    assert appended.json()["size"] == 4
    listed = client.get(f"{base}/files/seedfiles", params={"recursive": "true"}).json()["files"]
    assert [("in", "directory"), ("in/a.txt", "file"), ("own.txt", "file"), ("t", "file")] == [
        (file["filename"], file["type"]) for file in listed
    ]
    assert ["a.txt"] == [file["filename"] for file in client.get(f"{base}/files/seedfiles/in").json()["files"]]
    piece = client.get(f"{base}/readfile/seedfiles/t", params={"offset": 1, "buffer_size": 2}).json()
    assert {"content": "bc", "is_binary": False, "offset": 1, "size": 4, "is_eof": False} == piece
    assert ["in", "own.txt", "t"] == [f["filename"] for f in client.get(f"{base}/status/seedfiles").json()["files"]]
    missing = client.get(f"{base}/download/seedfiles/none")
    assert (404, "FILE_NOT_FOUND") == (missing.status_code, missing.json()["error"]["code"])
    assert client.get(f"{base}/download/seedfiles/%2e%2e%2fx").status_code == 400
    assert client.get(f"{base}/download/nobody/x").json()["error"]["code"] == "SESSION_NOT_FOUND"
    client.delete(f"{base}/session/seedfiles")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "files?limit=0", None),
        ("GET", "files?recursive=maybe", None),
        ("POST", "files/x", {"type": "link"}),
        ("POST", "files/x", {"type": "directory", "mode": 1}),
        ("PATCH", "files/x", {}),
        ("PATCH", "files/x", {"path": 5}),
        ("PUT", "files/", None),
        ("DELETE", "files/x?recursive=2", None),
    ],
)
def test_bad_input_is_a_problem(
    client: httpx.Client, sid: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = client.request(method, f"/v1/sessions/{sid}/{path}", json=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert json.loads(answer.text)["detail"]
