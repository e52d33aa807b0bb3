#!/bin/sh
# programs.sh fetch | keep: shares compiled programs among pods, see kustomization.yaml beside it.
#   SHARED    what all pods see                      LOCAL    where the server reads and writes
#   TOPOLOGY  the slice that they were compiled for  READYZ   answers 200 once the server is warm
set -eu

: "${SHARED:=/programs}" "${LOCAL:=/var/cache/slipstream/compiled}" "${TOPOLOGY:?}"
: "${READYZ:=http://127.0.0.1:9100/readyz}"

versions='from importlib.metadata import version as v; print("slipstream", v("slipstream-llm"), "jax", v("jax"), sep="-")'
KEY="$(python -c "$versions")-$TOPOLOGY"
KEEPER="$(uname -n).$$"

fetch() {
    copy "$SHARED/$KEY" "$LOCAL"
}

keep() {
    trap 'exit 0' TERM INT
    until ready; do nap 10; done
    copy "$LOCAL" "$SHARED/$KEY"
    while :; do nap 3600; done
}

# Other pods read and write the shared folder at any time: a file has its name once it is whole.
copy() {
    mkdir -p "$2"
    for program in "$1"/*; do
        name="${program##*/}"
        if [ -f "$program" ] && [ ! -e "$2/$name" ]; then
            cp "$program" "$2/.$name.$KEEPER"
            mv "$2/.$name.$KEEPER" "$2/$name"
        fi
    done
    echo "$2: $(count "$2") files"
}

count() { find "$1" -type f ! -name '.*' | wc -l; }

ready() { python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$READYZ" 2>/dev/null; }

# A sleep in the background: a termination does not wait for its end.
nap() {
    sleep "$1" &
    wait $!
}

"$1"
