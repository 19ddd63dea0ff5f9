#!/usr/bin/env bash
# What `make run` does: set-up, engine, image, the service, the README's example; then it serves until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

export SANDBOX_HOST=127.0.0.1 SANDBOX_PORT=${SANDBOX_PORT:-8000}
export no_proxy="localhost,127.0.0.1,${no_proxy:-}"
url=http://localhost:$SANDBOX_PORT
log=.run/orchestrator.log
start_limit_s=120
stopping=

say() { echo "run: $*"; }
fail() { echo "run: $*" >&2; exit 1; }

free_port() {
    python3 -I -S - "$SANDBOX_PORT" <<'PYTHON'
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"run: port {sys.argv[1]} cannot be used ({reason}): set SANDBOX_PORT to a free one")
PYTHON
}

weaker_mode() {
    cat >&2 <<'TEXT'

  ***************************************************************************************
  ** WEAKER MODE: the local engine. Without a Docker Engine nothing but bubblewrap (on   **
  ** macOS: sandbox-exec) stands between the code and this host. Good for a look, not    **
  ** for strangers' code. To get the full isolation: scripts/engine.sh says what to do.  **
  ***************************************************************************************

TEXT
    if [ "$(uname)" = Linux ] && ! command -v bwrap >/dev/null; then scripts/apt.sh bubblewrap; fi
    export SANDBOX_ENGINE=local
}

find_engine() {
    [ "${SANDBOX_ENGINE:-docker}" = docker ] || { weaker_mode; return; }
    local found status=0
    found=$(scripts/engine.sh) || status=$?
    case $status in
    0)
        export "${found?}"
        .venv/bin/python images/build.py python
        ;;
    3) weaker_mode ;;
    *) exit "$status" ;;
    esac
}

# Print what GET /ready says; succeed when that is 200.
ready() {
    .venv/bin/python -I -S - "$url/ready" <<'PYTHON'
import sys, urllib.error, urllib.request
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode()[:200])
except urllib.error.HTTPError as error:
    sys.exit(f"{error.code} {error.read().decode(errors='replace')[:200]}")
except OSError as error:
    sys.exit(f"no answer yet ({getattr(error, 'reason', error)})")
PYTHON
}

serve() {
    mkdir -p .run
    say "starting the service on $url; its log is $log"
    # With job control it gets a process group of its own, so a Ctrl-C reaches it once, through us.
    set -m
    .venv/bin/orchestrator serve --on-exit remove </dev/null >"$log" 2>&1 &
    service=$!
    set +m
    trap 'stop INT' INT
    trap 'stop TERM' TERM HUP
}

stop() { # SIGNAL
    stopping=yes
    kill -s "$1" "$service" 2>/dev/null || true
}

alive() { kill -0 "$service" 2>/dev/null; }

await_ready() { # fails when we were told to stop meanwhile
    local answer shown=$SECONDS begun=$SECONDS
    until answer=$(ready 2>&1); do
        if [ -n "$stopping" ]; then
            return 1
        elif ! alive; then
            tail -n 30 "$log" >&2
            fail "the service ended before it was ready; above is the end of $log"
        elif ((SECONDS - begun > start_limit_s)); then
            tail -n 30 "$log" >&2
            stop TERM
            fail "the service was not ready within $start_limit_s s (/ready says: $answer); above is the end of $log"
        elif ((SECONDS - shown >= 3)); then
            say "waiting for /ready, $((SECONDS - begun)) s: $answer"
            shown=$SECONDS
        fi
        sleep 0.3
    done
    say "ready after $((SECONDS - begun)) s"
}

example() {
    local target=$url/workspace/se/execute_code/my_session
    local body='{"code": "def handler(event): return {\"message\": \"Hello!\"}", "timeout": 10}'
    printf "\n\$ curl -sS -X POST %s \\\\\n    -H 'Content-Type: application/json' \\\\\n    -d '%s'\n" "$target" "$body"
    if command -v curl >/dev/null; then
        curl -sS -X POST "$target" -H 'Content-Type: application/json' -d "$body"
    else
        .venv/bin/python -I -S - "$target" "$body" <<'PYTHON'
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=30).read().decode(), end="")
PYTHON
    fi || say "the example failed; see $log" >&2
    # Its session would be in the way of the next example of the README, which starts one of the same name.
    .venv/bin/python -I -S -c 'import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method="DELETE"))' \
        "$url/v1/sessions/my_session" || true
    printf '\n\n'
}

free_port
command -v make >/dev/null || scripts/apt.sh make
make --no-print-directory --silent setup
find_engine
serve
if await_ready; then
    example
    say "serving on $url (browse $url/docs); Ctrl-C ends it"
fi
# A trapped signal ends `wait` early, so it is asked until the service is gone; then it tells the exit code.
while alive; do wait "$service" || true; done
status=0
wait "$service" || status=$?
say "the service ended with exit code $status"
exit "$status"
