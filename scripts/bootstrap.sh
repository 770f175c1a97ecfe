#!/usr/bin/env bash
# All set-up on a fresh Debian 12: system packages, and a Python environment (LibTorch and the tests' oracles).
# Idempotent; takes seconds when nothing is to do. The environment (5 GB) lives in a cache folder keyed by the pinned
# versions, so that every clone of one machine shares it: ${FSDP_CACHE_DIR:-~/.cache/libfsdp}.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/versions.env
say() { printf '[bootstrap] %s\n' "$*"; }

missing=""
for package in $APT_PACKAGES; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=" $package"
done
if [ -n "$missing" ]; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo"
  say "installing system packages:$missing"
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

python=${FSDP_PYTHON:-python3}
key=$(printf '%s %s' "$PYTHON_PACKAGES" "$($python -c 'import sys; print(sys.version, sys.base_prefix)')" | sha256sum | cut -c1-16)
cache=${FSDP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/libfsdp}
environment=$cache/venv-$key
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9  # Two clones may be set up at the same time.
if [ ! -f "$environment/complete" ]; then
  say "installing LibTorch and Python packages into $environment (about 5 GB, once for this machine)"
  rm -rf "$environment"
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check $PYTHON_PACKAGES
  touch "$environment/complete"
fi
if [ "$(readlink .venv 2>/dev/null)" != "$environment" ]; then
  [ -d .venv ] && [ ! -L .venv ] && { say ".venv exists and is not ours: move it away"; exit 2; }
  ln -sfn "$environment" .venv
fi
say "ready"
