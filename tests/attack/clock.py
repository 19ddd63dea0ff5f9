"""The wall clock jumps under a running service; libfaketime moves its clock and leaves the monotonic one alone."""

import math
import time
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.attack.cases import NotApplicable, check
from tests.attack.live import Live, serve, until

JUMPS_H = (2, -2, 0)
LIBRARIES = "lib*/**/faketime/libfaketime.so.1"
TTL_S = 4.0
TIMEOUT_S = 1.0


def library() -> Path:
    """Return libfaketime. NotApplicable where it is not installed."""
    found = next(Path("/usr").glob(LIBRARIES), None)
    if found is None:
        raise NotApplicable("needs libfaketime, Debian's package of that name")
    return found


def clock_jumps(live: Live, short: bool) -> str:
    """life-11: the wall clock jumps by two hours, forward and back: nothing expires sooner or later for it."""
    with TemporaryDirectory(prefix="sandbox-clock-") as folder:
        offset = Path(folder) / "offset"
        offset.write_text("+0h")
        environ = {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        with serve(environ=environ, pool_size=1) as own:
            until(own.is_ready, 60, "the pool is not full")
            before = set(own.sight.containers())
            sid = own.open()
            until(own.is_ready, 60, "the pool is not full")
            ready = set(own.sight.containers())
            check(before <= ready, "the first container is gone")
            errors_s = []
            for hours in JUMPS_H[: 2 if short else 3]:
                short_lived = own.open(ttl_s=TTL_S, idle_timeout_s=3600)
                begun = time.monotonic()
                own.execute(sid, "pass")
                offset.write_text(f"{hours:+d}h")
                seen_h = (told(own, sid, "expires_at") - time.time()) / 3600
                check(abs(seen_h - hours - 1) < 0.1, f"the service's clock did not jump: {seen_h - 1:+.2f} h")
                stopped = own.execute(sid, "import time; time.sleep(30)", timeout_s=TIMEOUT_S)
                took_s = time.monotonic() - begun
                check(stopped["outcome"] == "timeout", f"an execution ended as {stopped['outcome']}")
                check(TIMEOUT_S <= took_s < TIMEOUT_S + 3, f"a timeout of {TIMEOUT_S:g} s came after {took_s:.1f} s")
                check(0 < stopped["usage"]["wall_s"] < 3, f"its time is told as {stopped['usage']['wall_s']} s")
                own.is_usable(sid)
                until(lambda own=own, gone=short_lived: ended(own, gone), TTL_S + 10, "a session outlives its ttl")  # type: ignore[misc]
                lived_s = time.monotonic() - begun
                check(lived_s > TTL_S - 0.5, f"a session of {TTL_S:g} s lived for {lived_s:.1f} s")
                errors_s.append(lived_s - TTL_S)
                until(own.is_ready, 60, "the pool is not full")
            check(own.client.get(f"/v1/sessions/{sid}").status_code == 200, "a session expired by the jump")
            gone = own.samples().get('sandbox_containers_removed_total{reason="max_age"}', 0)
            check(gone == 0, f"{gone:g} ready containers were taken for old")
            sums = [value for name, value in own.samples().items() if name.split("{")[0].endswith("_seconds_sum")]
            check(
                all(0 <= value < 3600 and math.isfinite(value) for value in sums),
                "a duration is negative or hours long",
            )
    return f"jumps of +2, -4 and +2 h: a ttl of {TTL_S:g} s was kept to within {max(map(abs, errors_s)):.1f} s"


def told(live: Live, sid: str, field: str) -> float:
    """Return a time that the service tells of a session, as seconds of this process's clock."""
    return datetime.fromisoformat(live.client.get(f"/v1/sessions/{sid}").json()[field]).timestamp()


def ended(live: Live, sid: str) -> bool:
    """Tell whether the session has ended, without using it."""
    return all(session["id"] != sid for session in live.client.get("/v1/sessions").json()["sessions"])
