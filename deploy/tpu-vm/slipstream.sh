#!/bin/bash
# A server on a TPU VM, without Kubernetes. From the repository, as root:
#
#     slipstream.sh install          a user, this version under /opt/slipstream, systemd's unit; starts nothing
#     slipstream.sh fetch MODEL      downloads a model as that user, to name it in /etc/slipstream/serve.yaml
#     slipstream.sh serve            starts it, or starts it again, and waits until it is warm
#     slipstream.sh upgrade          installs this version beside the old one and serves it; goes back if it is not warm
#     slipstream.sh logs             what it says, line by line as it comes
#
# Versions lie side by side in /opt/slipstream, `current` is the one that runs. A start of the new version waits for the
# streams of the old one (`grace`); whoever must not wait needs a second machine. DESTDIR puts all files elsewhere.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
DESTDIR="${DESTDIR:-}"
releases="$DESTDIR/opt/slipstream"
config="$DESTDIR/etc/slipstream/serve.yaml"
TORCH_INDEX="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
WARM_S="${WARM_S:-1800}"

install_all() {
    id slipstream > /dev/null 2>&1 ||
        useradd --system --home-dir /var/cache/slipstream --shell /usr/sbin/nologin slipstream
    install_release
    if [ ! -e "$config" ]; then
        install -D --mode 644 "$here/serve.yaml" "$config"
    fi
    install -D --mode 644 "$here/slipstream.service" "$DESTDIR/etc/systemd/system/slipstream.service"
    systemctl daemon-reload
    systemctl enable slipstream
    echo "installed; edit $config, then: $0 serve"
}

# Into a folder of its own, from the locks; `current` points to it once it is whole.
install_release() {
    local release
    release="$releases/$(date --utc +%Y%m%d-%H%M%S)"
    "${PYTHON:-python3}" -m venv "$release"
    "$release/bin/pip" install --no-deps --require-hashes --index-url "$TORCH_INDEX" \
        --requirement "$repository/deploy/torch-cpu.lock"
    "$release/bin/pip" install --no-deps --require-hashes --only-binary :all: \
        --requirement "$repository/deploy/requirements.lock"
    "$release/bin/pip" install --no-deps --no-build-isolation "$repository"
    "$release/bin/pip" check
    point_to "$release"
}

point_to() {
    ln --symbolic --force --no-dereference "$1" "$releases/current"
}

fetch() {
    install --directory --owner slipstream --group slipstream "$DESTDIR/var/cache/slipstream"
    runuser --user slipstream -- env SLIPSTREAM_HOME=/var/cache/slipstream HF_HOME=/var/cache/slipstream/huggingface \
        "$releases/current/bin/slipstream" fetch "$1"
}

serve() {
    systemctl restart slipstream
    wait_until_warm
}

wait_until_warm() {
    local port deadline
    port="$(sed --quiet 's/^metrics-port: *\([0-9]*\).*/\1/p' "$config")"
    if [ -z "$port" ]; then
        echo "started; without metrics-port in $config nobody can tell when it is warm: $0 logs"
        return
    fi
    deadline=$((SECONDS + WARM_S))
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/readyz"; do
        if ! systemctl is-active --quiet slipstream; then
            echo "it ended before it was warm: $0 logs" >&2
            return 1
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            echo "not warm after $WARM_S s: $0 logs" >&2
            return 1
        fi
        sleep 2
    done
    echo "it serves"
}

upgrade() {
    local before
    before="$(readlink "$releases/current")"
    install_release
    if ! serve; then
        point_to "$before"
        serve
        echo "the new version did not serve; $before does again" >&2
        return 1
    fi
    echo "remove the old version when you no longer want it: rm -r $before"
}

case "${1:-}" in
    install) install_all ;;
    fetch) fetch "${2:?usage: $0 fetch MODEL}" ;;
    serve) serve ;;
    upgrade) upgrade ;;
    logs) exec journalctl --unit slipstream --follow --output cat ;;
    *)
        sed --quiet '2,/^set/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
