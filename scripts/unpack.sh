#!/bin/sh
# Unpack Debian packages beside the system, without installing them: scripts/unpack.sh SUITE DIRECTORY PACKAGE...
# They come from where this Debian's own packages come from, whatever their suite, and leave no trace in apt's state. What
# they depend on is the caller's affair. Once it is complete, the directory is left as it is.
# Exit code 3: not here; the last line on stderr says why.
set -eu

suite=$1 directory=$2
shift 2
log=$(mktemp)
trap 'rm -f "$log"' EXIT

say() { echo "unpack: $*" >&2; }

# Run one quiet step; its last line is the reason when it fails.
quietly() {
    "$@" >"$log" 2>&1 </dev/null || { say "\`$1 $2\` failed: $(tail -n 1 "$log")"; return 1; }
}

sources() { # apt reads the host's sources for us, whatever their format
    # shellcheck disable=SC2016  # apt's own variables
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) main' \
        'Created-By: Packages' 'Origin: Debian' 'Component: main'
}

own_apt() { # with the host's apt settings, without a trace in the host's apt state
    apt-get -o Dir::Etc::sourcelist="$directory/apt/suite.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::lists="$directory/apt/lists" \
        -o Dir::Cache="$directory/apt/cache" -o APT::Sandbox::User=root "$@"
}

[ ! -e "$directory/complete" ] || exit 0
if ! command -v apt-get >/dev/null || ! grep -qx 'ID=debian' /etc/os-release; then
    say "$*: only Debian can unpack its packages"
    exit 3
fi
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
rm -rf "$directory"
mkdir -p "$directory/apt/lists/partial" "$directory/apt/cache/archives/partial"
[ -n "$(sources)" ] || quietly apt-get update || exit 1 # before its first update apt tells nothing
sources | sed -n "s/ $codename\(-updates\|-security\|\) main$/ $suite\1 main/p" >"$directory/apt/suite.list"
say "downloading $* of Debian's $suite"
(cd "$directory/apt" && quietly own_apt update && quietly own_apt download "$@") || exit 1
for package in "$directory"/apt/*.deb; do quietly dpkg-deb -x "$package" "$directory" || exit 1; done
rm -rf "$directory/apt"
touch "$directory/complete"
