#!/usr/bin/env bash
# Configures and builds a preset (release by default): scripts/build.sh [preset] [ninja targets...]
# The program is at build/<preset>/bin/finetune.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-release}
shift || true
[ -e .venv ] || scripts/bootstrap.sh
cmake --preset "$preset" -Wno-dev >"/tmp/fsdp-configure-$$.log" 2>&1 || { cat "/tmp/fsdp-configure-$$.log"; exit 1; }
rm -f "/tmp/fsdp-configure-$$.log"
cmake --build "build/$preset" ${@:+--target "$@"}
