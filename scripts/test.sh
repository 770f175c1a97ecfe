#!/usr/bin/env bash
# Set-up, build, all tests. Its last line is "N passed, N failed, N skipped". Arguments go to ctest (-R name, -L label).
# FSDP_TEST_SCALE=long runs the slow suites at full size.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/bootstrap.sh
scripts/build.sh release
results=build/release/test-results.xml
status=0
rm -f "$results"
ctest --test-dir build/release --parallel "$(nproc)" --output-on-failure --output-junit test-results.xml \
  --schedule-random "$@" >build/release/test-output.log 2>&1 || status=$?
grep -E '\*\*\*(Failed|Timeout|Exception|Not Run)|^The following tests (FAILED|did not run)|^\s+[0-9]+ - ' \
  build/release/test-output.log || true
[ -f "$results" ] || { tail -n 50 build/release/test-output.log; exit 1; }
python3 - "$results" "$status" <<'PY'
import sys
import xml.etree.ElementTree as tree

suite = tree.parse(sys.argv[1]).getroot()
total, failed, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "skipped"))
skipped += int(suite.get("disabled", 0))
for case in suite.iter("testcase"):
    if case.get("status") == "fail":
        print(f"---- {case.get('name')}:", *(case.findtext("system-out") or "").splitlines()[-100:], sep="\n")
slowest = sorted(suite.iter("testcase"), key=lambda case: -float(case.get("time", 0)))[:5]
print("slowest: " + ", ".join(f"{case.get('name')} {float(case.get('time')):.0f} s" for case in slowest))
print(f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped")
sys.exit(0 if failed == 0 and total > 0 and int(sys.argv[2]) == 0 else 1)
PY
