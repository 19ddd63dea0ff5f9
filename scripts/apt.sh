#!/bin/sh
# Install Debian packages quietly, where that is ours to do: as root, with apt. Exit code 3: not here; one line says so.
set -eu

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "apt: please install $*: only root on Debian or Ubuntu can do it from here" >&2
    exit 3
fi
echo "apt: installing $*" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null || {
    echo "apt: installing $* failed: $(tail -n 1 "$log")" >&2
    exit 1
}
