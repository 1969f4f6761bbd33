#!/bin/sh
# A small real S3 server for the tests: moto, from PyPI.
#   moto.sh fetch         installs it once into the cache
#   moto.sh run PORT      becomes the server (exec) on 127.0.0.1:PORT
# Whoever starts it asks the server itself whether it is ready, and stops it by its own pid. It keeps all in memory.
set -eu

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/volley"
VENV="$CACHE/moto"

fetch() {
    [ ! -x "$VENV/bin/moto_server" ] || return 0
    command -v python3 >/dev/null || { echo "no python3 here" >&2; exit 3; }
    mkdir -p "$CACHE"
    # A venv's scripts name its directory, so it is made in place, under a lock against a second test run.
    exec 9>"$CACHE/moto.lock"
    flock 9
    [ ! -x "$VENV/bin/moto_server" ] || return 0
    { python3 -m venv "$VENV" && "$VENV/bin/pip" install -q 'moto[server,s3]'; } >&2 ||
        { rm -rf "$VENV"; echo "moto was not installed" >&2; exit 3; }
}

case "${1:-}" in
fetch) fetch ;;
run) fetch && exec "$VENV/bin/moto_server" -H 127.0.0.1 -p "$2" ;;
*) sed -n '2,5p' "$0" >&2 && exit 2 ;;
esac
