#!/bin/sh
# A real S3 server for the tests: MinIO, from its Go module.
#   minio.sh have           says whether it can be run without building it: status 0, or why not
#   minio.sh fetch          builds it once into the cache (4 to 5 minutes of two cores); prints the program
#   minio.sh run DIR PORT   becomes the server (exec) on 127.0.0.1:PORT, with all it writes under DIR
# Keys are volley and volley-secret. Whoever starts it asks the server itself whether it is ready
# (/minio/health/live), and stops it by its own pid.
set -eu

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/volley"
MINIO="$CACHE/minio/minio"

have() {
    [ ! -x "$MINIO" ] || return 0
    if [ "${VOLLEY_MINIO:-}" = 1 ]; then return 0; fi
    echo "MinIO is not in the cache (VOLLEY_MINIO=1 builds it once, 5 minutes)" >&2
    return 3
}

fetch() {
    if [ ! -x "$MINIO" ]; then
        command -v go >/dev/null || { echo "no go here, and no MinIO in $CACHE" >&2; exit 3; }
        mkdir -p "$CACHE"
        # One build at a time, moved into place when it is whole.
        exec 9>"$CACHE/minio.lock"
        flock 9
        if [ ! -x "$MINIO" ]; then
            part="$CACHE/minio.part.$$"
            GOBIN="$part" go install "github.com/minio/minio@${MINIO_VERSION:-latest}" >&2 ||
                { rm -rf "$part"; echo "MinIO was not built" >&2; exit 3; }
            mv -T "$part" "$CACHE/minio"
        fi
    fi
    echo "$MINIO"
}

run() {
    minio=$(fetch)
    mkdir -p "$1"
    export MINIO_ROOT_USER=volley MINIO_ROOT_PASSWORD=volley-secret MINIO_BROWSER=off
    exec "$minio" server --quiet --address "127.0.0.1:$2" "$1" >"$1.log" 2>&1
}

case "${1:-}" in
have) have ;;
fetch) fetch ;;
run) shift && run "$@" ;;
*) sed -n '2,7p' "$0" >&2 && exit 2 ;;
esac
