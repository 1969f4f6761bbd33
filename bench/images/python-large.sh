#!/bin/sh
# A real image of about 2.5 GB, and its first output through `volley run` on a host that never saw it.
#   python-large.sh build            debootstrap and PyPI packages, once, into the cache; prints the root directory
#   python-large.sh run VOLLEY       prepares it with that binary, runs it on two fresh hosts, prints times and bytes
# As root, with debootstrap, python3 and pip. The first host has no boot pack and records one; the second one, with a
# state of its own and the same object store, has it. Storage is a directory, so bytes are what counts here, not times;
# `volley bench image` has the times, behind a slow link. Everything is stopped by its own pid.
set -eu

CACHE="${XDG_CACHE_HOME:-$HOME/.cache}/volley"
ROOT="${PYTHON_LARGE_ROOT:-$CACHE/python-large}"
MIRROR="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
PACKAGES="numpy scipy pandas pyarrow scikit-learn tensorflow-cpu polars opencv-python-headless matplotlib ray"
PROGRAM='import numpy, pandas; print("sum", int(pandas.DataFrame({"a": numpy.arange(1000)}).a.sum()))'

build() {
    if [ ! -e "$ROOT/.complete" ]; then
        rm -rf "$ROOT"
        mkdir -p "$CACHE"
        {
            debootstrap --variant=minbase --include=python3 bookworm "$ROOT" "$MIRROR"
            # Wheels for the image's Python, not for this machine's.
            python3 -m pip install -q --no-cache-dir --target "$ROOT/usr/lib/python3/dist-packages" \
                --python-version 3.11 --implementation cp --only-binary=:all: $PACKAGES
            chroot "$ROOT" /usr/bin/python3 -m compileall -q /usr/lib/python3.11 \
                /usr/lib/python3/dist-packages/numpy /usr/lib/python3/dist-packages/pandas || true
            chroot "$ROOT" /usr/bin/python3 -c "$PROGRAM"
        } >&2
        touch "$ROOT/.complete"
    fi
    echo "$ROOT"
}

# One fleet of one host with state $2 over the objects $3: runs the program twice, prints times and what was fetched.
host() {
    name=$1 state=$2 objects=$3
    "$VOLLEY" dev --hosts 1 --burst 0 --state "$state" --objects "$objects" >"$state.log" 2>&1 &
    fleet=$!
    trap 'kill $fleet 2>/dev/null; wait $fleet 2>/dev/null || true' EXIT
    tries=0
    until [ -e "$state/client.toml" ] && grep -q 'Ctrl-C' "$state.log"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] && kill -0 $fleet || { cat "$state.log" >&2; exit 1; }
        sleep 0.1
    done
    client="$state/client.toml"
    if [ "$name" = first ]; then
        "$VOLLEY" image prepare --client "$client" "dir:$ROOT" --name python-large
    fi
    before=$(metric bytes_fetched)
    for turn in cold warm; do
        begun=$(date +%s%N)
        "$VOLLEY" run --client "$client" --image python-large --shape medium --budget 60s -- python3 -c "$PROGRAM"
        echo "$name host, $turn: $((($(date +%s%N) - begun) / 1000000)) ms from command to its end"
        # The figures are asked for every three seconds.
        sleep 4
        fetched=$(($(metric bytes_fetched) - before))
        if [ $turn = cold ]; then
            stored=$("$VOLLEY" image ls --client "$client" -o json | python3 -c \
                'import json,sys; r=[i for i in json.load(sys.stdin) if i["name"]=="python-large"][0]; print(r["stored_bytes"], r["bytes"])')
            set -- $stored
            python3 -c "print('$name host, cold: fetched %.1f MB, %.2f %% of the %.0f MB that are stored of its %.0f MB' % \
                ($fetched/1e6, 100*$fetched/$1, $1/1e6, $2/1e6))"
            python3 -c "import sys; sys.exit(0 if 10*$fetched < $1 else 'more than a tenth was read')"
        fi
    done
    # A first run is watched for ten seconds at most, and its boot pack written then.
    sleep 8
    "$VOLLEY" image inspect --client "$client" python-large | grep 'boot packs'
    kill -INT $fleet
    wait $fleet || true
    trap - EXIT
}

metric() {
    ops=$(sed -n 's/^ops = "\(.*\)"/\1/p' "$state/config/hostd-1.toml")
    python3 -c "import urllib.request,sys
text = urllib.request.urlopen('http://$ops/metrics').read().decode()
print(next((line.split()[1] for line in text.splitlines() if line.startswith('hostd_image_$1 ')), 0))"
}

run() {
    VOLLEY=$1
    build >/dev/null
    work=$(mktemp -d)
    mkdir "$work/objects"
    ( host first "$work/one" "dir://$work/objects" )
    ( host second "$work/two" "dir://$work/objects" )
    rm -rf "$work"
}

case "${1:-}" in
build) build ;;
run) run "${2:?the volley binary}" ;;
*) sed -n '2,7p' "$0" >&2 && exit 2 ;;
esac
