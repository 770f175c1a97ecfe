"""Breaks the engine on purpose, one place at a time, and requires that a test fails.

    python3 tests/mutations/run.py [--work DIR] [--programs plan_test training_test finetune]

Copies the tree, builds the tests once, then for each mutation: edit, build, run the test that must object, undo. Not
part of the ordinary tests: it takes some minutes. Exits 1 when a mutation survives.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# What, file, text, replacement, test program, filter.
TRANSFERS = "libfsdp/engine/unit_transfers.cpp"
MUTATIONS = [
    ("an edge of the schedule is dropped", "libfsdp/plan/dependencies.cpp",
     "  after.push_back({.op = need.position", "  if (need.position % 5 != 0) after.push_back({.op = need.position",
     "plan_test", "*"),
    ("no re-gather before backward", TRANSFERS,
     "  if (poison_) poison(slot);", "  if (has_sums_.back()) return {};", "engine_test", "*"),
    ("rank 1 skips one reduce", TRANSFERS,
     "    if (!bucket.trainable) continue;\n    last = comm_.begin_fold(members",
     "    if (!bucket.trainable || (comm_.rank() == 1 && unit == 3)) continue;\n    last = comm_.begin_fold(members",
     "engine_test", "*"),
    ("a shard is shifted by one quantum", "libfsdp/plan/layout.cpp",
     ".param_at = begin - segment.begin,", ".param_at = std::max<int64_t>(0, begin - segment.begin - 256),",
     "engine_test", "*"),
    ("a gradient is folded from the wrong place", TRANSFERS,
     "coordinate * bucket.shard_numel", "(placement_.mesh.shard - 1 - coordinate) * bucket.shard_numel",
     "engine_test", "*"),
    ("replicas do not take the others' sums", TRANSFERS,
     "    const comm::SymmetricSpan sums = storage_.sums_source(b);\n    last = comm_.begin_gather(",
     "    const comm::SymmetricSpan sums = storage_.sums_source(b);\n    if (unit == 2) continue;\n"
     "    last = comm_.begin_gather(",
     "engine_test", "*"),
    ("sums that were offloaded are not brought back", TRANSFERS,
     "return there || !has_sums_[at(unit)] ? 0 : copy_sums(unit, /*to_host=*/false);", "return there ? 0 : 0;",
     "engine_test", "*"),
    ("an offloaded shard is not brought again after an update", TRANSFERS,
     "if (staged_[stage].unit == unit && staged_[stage].version == version_) return 0;",
     "if (staged_[stage].unit == unit) return 0;",
     "engine_test", "*"),
    ("sums stay in a slot that replicas read", "libfsdp/engine/storage.cpp",
     "if (placement_.mesh.replicate > 1 || offloads()", "if (offloads()",
     "engine_test", "*"),
    ("a fold in several groups overwrites its source", "libfsdp/kernels/fold.cpp",
     "const bool groups = sources.size() > static_cast<size_t>(kGroup);", "const bool groups = false;",
     "kernels_test", "Fold*"),
    ("parameters are shells in backward", "libfsdp/shard/sharded_core.cpp",
     "core.in_backward_.push_back(this);\n    core.expose(*this);", "core.in_backward_.push_back(this);",
     "exactness_test", "*F32"),
    ("all ranks are fed rank 0's data", "libfsdp/trainer/train.cpp",
     "for (int64_t m = place.first + rank; m < place.end; m += plan_.ranks)",
     "for (int64_t m = place.first; m < place.end - rank; m += plan_.ranks)",
     "finetune", "test_train.Train.test_ranks_agree_bitwise_when_deterministic"),
]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def objects(build, tree, program, test):
    """Whether the test fails on the mutated tree."""
    if program == "finetune":
        done = run([str(tree / ".venv/bin/python"), "-m", "unittest", test], cwd=tree / "tests/apps", timeout=600,
                   env={**os.environ, "FINETUNE": str(build / "bin/finetune"), "FSDP_SOURCE_DIR": str(tree)})
    else:
        done = run([str(build / "bin" / program), f"--gtest_filter={test}", "--gtest_brief=1"], timeout=600)
    return done.returncode != 0, done.stdout + done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=str(ROOT / "build/mutations"))
    parser.add_argument("--programs", nargs="*", help="only mutations that these programs must catch")
    options = parser.parse_args()
    mutations = [one for one in MUTATIONS if not options.programs or one[4] in options.programs]
    work = pathlib.Path(options.work)
    tree, build = work / "tree", work / "build"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns("build", ".git"))
    programs = sorted({mutation[4] for mutation in mutations})
    for command in (["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), "-DFSDP_WITH_CUDA=OFF"],
                    ["cmake", "--build", str(build), "--target", *programs]):
        done = run(command)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    survivors = 0
    for what, file, text, replacement, program, test in mutations:
        path = tree / file
        original = path.read_text()
        if original.count(text) != 1:
            sys.exit(f"{file} holds the text of '{what}' {original.count(text)} times")
        failed, _ = objects(build, tree, program, test)
        if failed:
            sys.exit(f"{program} {test} fails without a mutation")
        path.write_text(original.replace(text, replacement))
        done = run(["cmake", "--build", str(build), "--target", program])
        if done.returncode:
            sys.exit(f"'{what}' does not compile:\n{done.stdout[-2000:]}")
        failed, output = objects(build, tree, program, test)
        lines = [line for line in output.splitlines() if "rror" in line or "differ" in line or "exceeds" in line]
        print(f"{'caught  ' if failed else 'SURVIVED'}  {what}  ({program})", flush=True)
        if failed and lines:
            print(f"            {lines[0].strip()[:150]}", flush=True)
        survivors += not failed
        path.write_text(original)
        run(["cmake", "--build", str(build), "--target", program])
    print(f"{len(mutations) - survivors} of {len(mutations)} mutations caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
