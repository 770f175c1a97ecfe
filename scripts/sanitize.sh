#!/usr/bin/env bash
# Builds the engine's own tests with sanitizers, runs them, and ends non-zero on any finding or failed test:
#   scripts/sanitize.sh [address|thread] [test programs...]        (by default both kinds, all programs below)
# address = AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer; thread = ThreadSanitizer. The ranks of these
# tests are threads of one process, so that ThreadSanitizer sees races between ranks; tests/procs is outside its view.
# What is suppressed, and why, stands in tests/sanitizers. Reports are left in <build>/sanitizer-reports.
# FSDP_BUILD_ROOT (build) is where the folders asan and tsan go, FSDP_BUILD_JOBS (all cores) how many compilers run.
set -euo pipefail
cd "$(dirname "$0")/.."
kinds=(address thread)
case ${1:-} in address | thread) kinds=("$1"); shift ;; esac
programs=("$@")
[ $# -gt 0 ] || programs=(
  plan_test kernels_test optim_test io_test engine_test
  comm_test comm_conformance_test comm_device_test gloo_conformance_test
  checkpoint_test state_files_test checkpoint_commit_test
  calls_test exactness_test misuse_test training_test device_training_test precision_test
  lora_test lora_layers_test)
[ -e .venv ] || scripts/bootstrap.sh
supp=$PWD/tests/sanitizers
export OMP_NUM_THREADS=1  # No sanitizer sees the barriers of libgomp: its threads would all seem to race.

# Options of both runtimes for the program whose reports go to files that begin with $1.
set_options() {
  local common="log_path=$1:exitcode=66"
  export ASAN_OPTIONS="$common:detect_leaks=1:detect_stack_use_after_return=1:check_initialization_order=1"
  export LSAN_OPTIONS="suppressions=$supp/lsan.supp:print_suppressions=0"
  export UBSAN_OPTIONS="$common:print_stacktrace=1:halt_on_error=1"
  export TSAN_OPTIONS="$common:suppressions=$supp/tsan.supp:print_suppressions=0:history_size=4"
}

# run_program <build folder> <program>: one line of the table; false on a finding, a failed test, or no test.
run_program() {
  local build=$1 program=$2 status=0 start=$SECONDS
  local reports=$build/sanitizer-reports/$program
  set_options "$reports"
  timeout 3600 "$build/bin/$program" --gtest_color=no >"$reports.out" 2>&1 || status=$?
  local tests findings
  tests=$(sed -n 's/^\[==========\] \([0-9]*\) tests\? from .* ran\..*/\1/p' "$reports.out")
  findings=$(cat "$reports".* | grep -cE 'ERROR: [A-Za-z]+Sanitizer|WARNING: ThreadSanitizer|: runtime error: ' || true)
  printf '%-24s %-8s %6s tests %4s findings  exit %3s %6s s\n' \
    "$program" "$kind" "${tests:-0}" "$findings" "$status" $((SECONDS - start))
  [ "$status" = 0 ] && [ "$findings" = 0 ] && [ "${tests:-0}" -gt 0 ] && return
  grep -hE -A 12 '^\[  FAILED  \]|: Failure$|: runtime error: ' "$reports.out" | head -n 60 || true
  cat "$reports".[0-9]* 2>/dev/null | head -n 80 || true
  return 1
}

bad=0
for kind in "${kinds[@]}"; do
  preset=$([ "$kind" = address ] && echo asan || echo tsan)
  build=$(mkdir -p "${FSDP_BUILD_ROOT:-build}" && cd "${FSDP_BUILD_ROOT:-build}" && pwd)/$preset
  mkdir -p "$build/sanitizer-reports"
  log=$build/sanitizer-reports/build.log
  { cmake --preset "$preset" -B "$build" -Wno-dev &&
    cmake --build "$build" --parallel "${FSDP_BUILD_JOBS:-$(nproc)}" --target "${programs[@]}"; } >"$log" 2>&1 ||
    { tail -n 60 "$log"; exit 1; }
  rm -f "$build"/sanitizer-reports/*_test*
  for program in "${programs[@]}"; do run_program "$build" "$program" || bad=$((bad + 1)); done
done
echo "$bad programs with findings or failures"
[ "$bad" = 0 ]
