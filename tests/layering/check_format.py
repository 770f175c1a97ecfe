"""Every source of ours is as clang-format 14 leaves it. Exit status 77 when that program is not there."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "14."
SKIPPED = 77


def find_clang_format() -> str | None:
    for name in ("clang-format-14", "clang-format"):
        if program := shutil.which(name):
            words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
            if words[words.index("version") + 1].startswith(VERSION):
                return program
    return None


def main() -> int:
    program = find_clang_format()
    if program is None:
        print(f"skipped: clang-format {VERSION}x is not installed")
        return SKIPPED
    files = [str(path) for folder in ("libfsdp", "apps", "bindings", "examples", "tests", "benchmarks")
             for path in sorted((ROOT / folder).rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    chunks = [files[i:i + 20] for i in range(0, len(files), 20)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda chunk: subprocess.run(
            [program, "--dry-run", "-Werror", "-ferror-limit=1", *chunk], capture_output=True, text=True), chunks))
    wrong = sorted({line.split(":")[0] for run in runs for line in run.stderr.splitlines() if ": error:" in line})
    for path in wrong:
        print(f"{Path(path).relative_to(ROOT)} is not formatted: run {program} -i on it")
    broken = [run.stderr for run in runs if run.returncode != 0 and ": error:" not in run.stderr]
    print(*broken, f"{len(files)} files looked at", sep="\n")
    return 1 if wrong or broken or not files else 0


if __name__ == "__main__":
    sys.exit(main())
