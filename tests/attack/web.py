"""HTTP cases: hostile requests to the service's doors, in the wire form that the case describes."""

import gzip
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote

from tests.attack.after import Scene, quantile, watched
from tests.attack.cases import Case, NotApplicable, check
from tests.attack.live import KEY, Live, serve, until
from tests.attack.sight import DockerSight
from tests.attack.wire import Answer, chunked, exchange, parallel, request

JSON_TYPE = "Content-Type: application/json"
MIB = 1 << 20
BODY_SLACK = 8 * MIB  # what may be on its way in sockets' buffers when a body is refused
RSS_SLACK = 64 * MIB
OUR_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # the case's note: ids like these are fine
SLOW_CLIENTS, FEW_SLOW_CLIENTS = 2000, 200
SLOW_S = 40.0  # a slow client is to be closed within this time
REMOVAL_S = 30.0


def run(live: Live, case: Case, *, short: bool) -> None:
    """Send what the case describes; raise Failed when an answer is not among those it expects."""
    with live.session() as sid, watched(Scene(live, sid, case)):
        since = live.log_size()
        attack = ATTACKS.get(case.id)
        if attack is not None:
            attack(live, case, sid, short)
        else:
            plain(live, case, sid)
        faults = [str(event.get("exception", ""))[-200:] for event in live.events("request_failed", since)]
        check(not faults, f"{len(faults)} requests failed inside the service: {faults[:1]}")
    check(live.answers(), "the service does not answer any more")


def expect_status(case: Case, answer: Answer, about: str = "") -> None:
    """Check that the case allows the answer's status, and that an error is a problem document or the parser's."""
    allowed = case.expect["http_status"]
    check(answer.status in allowed, f"{about[:100]} {answer.status} instead of {allowed}: {answer.body[:200]!r}")
    if answer.status >= 400 and answer.headers.get("content-type", "").startswith("application/"):
        problem = json.loads(answer.body)
        check(set(problem) >= {"title", "status", "detail", "code"}, f"no problem document: {answer.body[:200]!r}")


def headers_of(case: Case) -> list[str]:
    """Return the case's own header lines, with a content type unless it has one."""
    given = case.payload.get("headers", {})
    lines = [f"{name}: {value}" for name, value in given.items()]
    return lines if "Content-Type" in given else [JSON_TYPE, *lines]


def plain(live: Live, case: Case, sid: str) -> None:
    """Send the requests that the payload's fields describe, one after the other."""
    payload = case.payload
    key = payload.get("auth", live.key)
    target = payload["path"].replace("{sid}", sid)
    for body in bodies(payload):
        check(body is None or len(body) < MIB * 8, "a body of this size needs an attack of its own")
        answer = exchange(live.port, [request(payload["method"], target, *headers_of(case), body=body, key=key)])
        expect_status(case, answer, str(body))


def bodies(payload: dict[str, Any]) -> Iterator[bytes | None]:
    """Yield the bodies of a payload, None for a request without one."""
    if "json" in payload:
        yield dump(payload["json"])
    elif "body" in payload:
        yield payload["body"].encode()
    elif "body_repeat" in payload:
        text, count = payload["body_repeat"]
        yield text.encode() * count
    elif "for_each_json" in payload:
        for document in payload["for_each_json"]:
            yield dump(document)
    else:
        yield None


def dump(document: Any) -> bytes:
    """Return JSON in ASCII: what is no character, such as half a surrogate pair, stays an escape."""
    return json.dumps(document).encode()


# --- one function for each case that is more than one request after the other


def wrong_keys(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-02: every key that is none is refused, and none costs memory."""
    target = f"/v1/sessions/{sid}/executions"
    body = dump({"code": "print(1)"})
    wrong = ["wrong", "", KEY + "x", KEY[:-1], KEY.upper(), "x" * MIB, "ключ", "a\r\nX-API-Key: b", "a\nb", "\x00"]
    for header in ("Authorization: Bearer ", "X-API-Key: ", "Authorization: Basic ", "Authorization:"):
        for key in wrong:
            sent = request("POST", target, JSON_TYPE, header + key, body=body, key=None)
            expect_status(case, exchange(live.port, [sent]), header + key)
    live.forget_peak()
    before = live.memory()
    endless = (b"X-%d: " % number + b"x" * MIB + b"\r\n" for number in range(200))
    head = request("GET", "/health", key=None).removesuffix(b"\r\n")
    answer = exchange(live.port, [head, *endless, b"\r\n"])
    grown = live.memory("VmHWM") - before
    check(grown < RSS_SLACK, f"200 MiB of headers were answered {answer.status} and took {grown >> 20} MiB of memory")


def hostile_ids(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-04: ids that are none, under the case's field name and under ours; nothing of them reaches the engine."""
    for document in case.payload["for_each_json"]:
        body = dump(document)
        expect_status(case, exchange(live.port, [request("POST", "/v1/sessions", JSON_TYPE, body=body)]), str(body))
        given = document["session_id"]
        answer = exchange(live.port, [request("POST", "/v1/sessions", JSON_TYPE, body=dump({"id": given}))])
        if OUR_ID.fullmatch(given):
            check(answer.status == 201, f"the id {given!r} was answered {answer.status}")
            live.client.delete(f"/v1/sessions/{given}")
        else:
            expect_status(case, answer, f"id {given!r}")
    if isinstance(live.sight, DockerSight):
        for name in live.sight.containers():
            check(re.fullmatch(rf"sandbox-{live.instance}-[0-9a-f]+", name), f"a container is called {name!r}")
            labels = (live.sight.inspect(name) or {"Config": {"Labels": {}}})["Config"]["Labels"]
            check(sid not in str(labels), f"a label carries a client's text: {labels}")


def hostile_paths(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-05: ids in the path that are none, as they are and escaped."""
    for given in case.payload["for_each_id"]:
        for written in {given, quote(given, safe="")}:
            answer = exchange(live.port, [request("GET", f"/v1/sessions/{written}")])
            expect_status(case, answer, repr(written))


def huge_code(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-08: 200 MiB of code are refused at the limit, while they are sent, with a length and without."""
    limit = int(str(live.settings.get("max_body", 8 * MIB)))
    head, tail = b'{"language":"python","code":"', b'"}'
    size = 200 * MIB
    for how in ("chunked", "with a length"):
        live.forget_peak()
        before = live.memory()
        pieces: Iterable[bytes] = (head, *(b"x" * MIB for _ in range(200)), tail)
        if how == "chunked":
            first = request("POST", f"/v1/sessions/{sid}/executions", JSON_TYPE, "Transfer-Encoding: chunked")
            pieces = chunked(pieces)
        else:
            length = f"Content-Length: {len(head) + size + len(tail)}"
            first = request("POST", f"/v1/sessions/{sid}/executions", JSON_TYPE, length)
        answer = exchange(live.port, [first, *pieces])
        expect_status(case, answer, how)
        check(answer.sent < limit + BODY_SLACK, f"{how}: {answer.sent >> 20} MiB were taken before the refusal")
        grown = live.memory("VmHWM") - before
        check(grown < RSS_SLACK, f"{how}: the orchestrator grew by {grown >> 20} MiB")


def slow_clients(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-14: clients that send a byte now and then are closed in time, and hold up nobody."""
    count = FEW_SLOW_CLIENTS if short else SLOW_CLIENTS
    headers = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
    body = request("POST", f"/v1/sessions/{sid}/executions", JSON_TYPE, "Content-Length: 1000")
    times: list[float] = []
    before = live.files()
    slow: list[socket.socket] = []
    try:
        for number in range(count):
            connection = socket.create_connection(("127.0.0.1", live.port))
            connection.sendall(headers if number % 2 else body)
            connection.setblocking(False)
            slow.append(connection)
        begun = time.monotonic()
        sent_at = 0.0
        while slow and time.monotonic() - begun < SLOW_S:
            if time.monotonic() - sent_at >= 5:
                sent_at = time.monotonic()
                slow = [connection for connection in slow if drip(connection)]
            asked = time.monotonic()
            live.is_usable(sid)
            times.append(time.monotonic() - asked)
            time.sleep(0.2)
        late = quantile(times, 0.99)
        check(late < 1, f"ordinary executions took {late:.2f} s beside {count} slow clients")
        check(not slow, f"{len(slow)} of {count} slow clients are still connected after {SLOW_S:g} s")
    finally:
        for connection in slow:
            connection.close()
    until(lambda: live.files() < before + 20, 10, "the descriptors of slow clients were not closed")


def drip(connection: socket.socket) -> bool:
    """Send one more byte; return whether the connection still stands, and close it when it does not."""
    try:
        if connection.recv(4096) == b"":
            raise ConnectionResetError
    except BlockingIOError:
        pass
    except ConnectionError:
        connection.close()
        return False
    try:
        connection.send(b"x")
    except ConnectionError:
        connection.close()
        return False
    return True


def many_executions(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-16: every one of many executions is either run, once, or refused with Retry-After."""
    body = case.payload["json"] | {"code": "open('/workspace/ran','a').write('x')\n" + case.payload["json"]["code"]}
    path = f"/v1/sessions/{sid}/executions"
    answers = parallel(live, [("POST", path, body)] * case.payload["parallel"])
    statuses = {answer.status_code for answer in answers}
    check(statuses <= set(case.expect["http_status"]), f"statuses {statuses}")
    done = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    check(all("retry-after" in answer.headers for answer in refused), "a refusal has no Retry-After")
    check(refused, "none of them was refused: the queue has no bound")
    wrong = [told for told in done if (told["outcome"], told["stdout"]) != ("ok", "1\n")]
    check(not wrong, f"{len(wrong)} of {len(done)} accepted executions came to something else: {wrong[:1]}")
    check(len({told["id"] for told in done}) == len(done), "two answers are of one execution")
    ran = live.execute(sid, "print(len(open('/workspace/ran').read()))")["stdout"]
    check(int(ran) == len(done), f"{len(done)} executions were accepted and {ran.strip()} ran")


def many_sessions(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-17: never more containers than allowed; what is over is refused with Retry-After."""
    cap = int(str(live.settings["max_containers"]))
    answers = parallel(live, [("POST", "/v1/sessions", {})] * case.payload["parallel"])
    made = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    try:
        statuses = {answer.status_code for answer in answers}
        check(statuses <= set(case.expect["http_status"]), f"statuses {statuses}")
        refused = [answer for answer in answers if answer.status_code != 201]
        check(all("retry-after" in answer.headers for answer in refused), "a refusal has no Retry-After")
        check(0 < len(made) < cap + 1, f"{len(made)} sessions under a cap of {cap} containers")
        existing = live.sight.containers()
        check(len(existing) <= cap, f"{len(existing)} containers under a cap of {cap}")
        held = len(live.client.get("/v1/sessions").json()["sessions"])
        check(held == len(made) + 1, f"{held} sessions are listed, {len(made) + 1} were accepted")
        pool = live.pool()
        owned = held + pool["ready"] + pool["starting"]
        check(len(existing) <= owned, f"{len(existing)} containers, {owned} of them held by someone")
    finally:
        parallel(live, [("DELETE", f"/v1/sessions/{made_sid}", None) for made_sid in made])
    until(live.is_ready, REMOVAL_S, "the pool is not full again")
    size = 1 + int(str(live.settings["pool_size"]))
    until(lambda: len(live.sight.containers()) == size, REMOVAL_S, "containers were left")


def hostile_headers(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-19: headers that try to forge log lines, as the case has them and where a log line is written."""
    lines = [f"{name}: {value}" for name, value in case.payload["headers"].items()]
    tame = [line.replace("\n", " ").replace("\x1b", " ") for line in lines]
    for sent in (lines, lines[:1], lines[1:], tame):
        expect_status(case, exchange(live.port, [request("GET", f"/v1/sessions/{sid}", *sent)]), str(sent))
    forged = 'x\n{"event":"fake"}\r\x1b[2J'
    body = dump({"metadata": {"a": forged}, "env": {"A": forged}, "id": f"log-{secrets.token_hex(4)}"})
    made = json.loads(exchange(live.port, [request("POST", "/v1/sessions", JSON_TYPE, *tame, body=body)]).body)
    body = dump({"code": f"print({forged!r})", "args": [forged], "stdin": forged})
    path = f"/v1/sessions/{made['id']}/executions"
    answer = exchange(live.port, [request("POST", path, JSON_TYPE, *tame, body=body)])
    check(answer.status == 200, f"an execution with odd text was answered {answer.status}")
    live.client.delete(f"/v1/sessions/{made['id']}")
    check(not live.events("fake"), "a forged event is in the log")


def unknown_paths(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-20: paths, methods and agents that nobody knows make no series in the metrics."""
    times = 500 if short else case.payload["times"]
    for number in range(times):
        agent = {"User-Agent": secrets.token_hex(4)}
        answer = live.client.get(f"/unknown/{secrets.token_hex(8)}", headers=agent)
        expect_status(case, Answer(answer.status_code, {}, answer.content), str(number))
    before = set(live.samples())
    for method in ("BREW", "get", "PROPFIND", "X" * 1000):
        exchange(live.port, [request(method, f"/v1/sessions/{secrets.token_hex(8)}")])
    added = set(live.samples()) - before
    check(not added, f"a method made {len(added)} series, such as {sorted(added)[:1]}")


def from_a_web_page(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-22: what a page of another origin can send runs no code, on a service without keys neither."""
    plain(live, case, sid)
    before = live.client.get(f"/v1/sessions/{sid}").json()["executions"]
    check(before == 0, "the request ran code")
    with serve(live.engine, api_keys=None, pool_size=1) as keyless:
        keyless.key = None
        with keyless.session() as other:
            target = f"/v1/sessions/{other}/executions"
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                origin = "Origin: http://evil.example"
                body = case.payload["body"].encode()
                sent = request("POST", target, f"Content-Type: {kind}", origin, body=body, key=None)
                expect_status(case, exchange(keyless.port, [sent]), f"without keys, {kind}")
            rebound = request("GET", f"/v1/sessions/{other}", key=None).replace(
                b"Host: 127.0.0.1", b"Host: evil.example"
            )
            expect_status(case, exchange(keyless.port, [rebound]), "without keys, under another host name")


def parallel_ends(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-23: one session, ended by many at once."""
    answers = parallel(live, [("DELETE", f"/v1/sessions/{sid}", None)] * case.payload["parallel"])
    statuses = [answer.status_code for answer in answers]
    check(set(statuses) <= set(case.expect["http_status"]), f"statuses {set(statuses)}")
    check(statuses.count(204) == 1, f"{statuses.count(204)} of them ended it")


def packed_body(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-25: a body that grows when it is unpacked is not unpacked."""
    live.forget_peak()
    before = live.memory()
    packed = gzip.compress(b'{"code":"' + b"x" * (64 * MIB) + b'"}', 9)
    for times in (1, 16):
        sent = request("POST", f"/v1/sessions/{sid}/executions", *headers_of(case), body=packed * times)
        expect_status(case, exchange(live.port, [sent]), f"{len(packed) * times} packed bytes")
    grown = live.memory("VmHWM") - before
    check(grown < RSS_SLACK, f"the orchestrator grew by {grown >> 20} MiB")


def same_key_twice(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-26: a request that is sent again under its key is not run again."""
    path, headers = f"/v1/sessions/{sid}/executions", case.payload["headers"]
    first, second = (live.client.post(path, json=case.payload["json"], headers=headers) for _ in range(2))
    check(first.status_code == 200, f"the first request was answered {first.status_code}")
    if second.status_code == 200 and first.json()["id"] != second.json()["id"]:
        raise NotApplicable("keys are not offered: both requests were run")
    check(first.content == second.content, "the second answer is another one")
    ran = live.execute(sid, "print(open('/workspace/n').read())")["stdout"]
    check(ran == "x\n", f"it ran {len(ran.strip())} times")


def hostile_queries(live: Live, case: Case, sid: str, short: bool) -> None:
    """api-28: as the case has it, where there is no such list; and the same on the lists that there are."""
    expect_status(case, exchange(live.port, [request("GET", case.payload["path"].replace("{{", "%7B%7B"))]))
    for path in ("/v1/sessions", f"/v1/sessions/{sid}/executions"):
        for query in ("limit=-1", "limit=1e9", "limit=0", "limit=99999999999999999999", "limit=__class__"):
            answer = exchange(live.port, [request("GET", f"{path}?{query}&sort=__class__&filter=%7B%7B7*7%7D%7D")])
            check(b"49" not in answer.body.replace(sid.encode(), b"")[:20], "a template was evaluated")
            if path == "/v1/sessions":
                expect_status(case, answer, query)
            else:
                check(answer.status in (200, 400), f"{path}?{query}: {answer.status}")


Attack = Callable[[Live, Case, str, bool], None]
ATTACKS: dict[str, Attack] = {
    "api-02": wrong_keys,
    "api-04": hostile_ids,
    "api-05": hostile_paths,
    "api-08": huge_code,
    "api-14": slow_clients,
    "api-16": many_executions,
    "api-17": many_sessions,
    "api-19": hostile_headers,
    "api-20": unknown_paths,
    "api-22": from_a_web_page,
    "api-23": parallel_ends,
    "api-25": packed_body,
    "api-26": same_key_twice,
    "api-28": hostile_queries,
}
