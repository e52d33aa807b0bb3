#!/bin/bash
# try-image.sh FOLDER: what deploy/Dockerfile does, without Docker, into an empty folder. Installs from the locks, checks
# the packages, tells the size, and serves the embedded model from there: as a user that owns nothing but its cache, and
# with a read-only root where the kernel lets us. Needs root for that user; a few minutes, 3 GB.
#
# PyTorch comes from wherever pip finds it, as long as it has the hash that is locked. PYTHON names an interpreter that
# other users can run (python3).
set -euo pipefail

repository="$(cd "$(dirname "$0")/.." && pwd)"
target="${1:?usage: try-image.sh FOLDER}"
[ ! -e "$target" ] || { echo "$target is there already; name a folder that is not" >&2; exit 2; }
mkdir -p "$target"/build "$target"/cache "$target"/tmp
target="$(cd "$target" && pwd)"
prefix="$target/opt"

"${PYTHON:-python3}" -m venv "$prefix"
"$prefix/bin/pip" install --quiet --no-deps --require-hashes --requirement "$repository/deploy/torch-cpu.lock"
"$prefix/bin/pip" install --quiet --no-deps --require-hashes --only-binary :all: \
    --requirement "$repository/deploy/requirements.lock"
# The same files that the Dockerfile copies, and no others.
sed -n 's/^COPY \([^-].*\) [^ ]*$/\1/p' "$repository/deploy/Dockerfile" | tr ' ' '\n' |
    (cd "$repository" && xargs tar --create --exclude __pycache__) | tar --extract --directory "$target/build"
(cd "$target/build" && "$prefix/bin/pip" install --quiet --no-deps --no-build-isolation .)
rm -rf "$target/build"
"$prefix/bin/pip" check
echo "size: $(du --summarize --block-size=M "$prefix" | cut -f1)"

chown 10001:10001 "$target/cache" "$target/tmp"
chmod -R go+rX "$target"
cat > "$target/serve.sh" <<INSIDE
set -e
if mount --make-rprivate / 2>/dev/null && mount --bind "$target/cache" "$target/cache" &&
    mount --bind "$target/tmp" "$target/tmp" && mount --options remount,bind,ro /; then
    echo "root: read-only"
else
    echo "root: as it is (no right to mount)"
fi
cd "$target/cache"
exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set -all \
    env --unset PYTHONPATH PATH="$prefix/bin:/usr/bin:/bin" TMPDIR="$target/tmp" HOME="$target/cache" \
    SLIPSTREAM_HOME="$target/cache" slipstream demo --platform cpu
INSIDE
if unshare --mount true 2>/dev/null; then
    unshare --mount bash "$target/serve.sh"
else
    bash "$target/serve.sh"
fi
