"""The rules hold in this repository, and each rule can fail."""

import sys
import tempfile
import unittest
from pathlib import Path

import layers

ROOT = Path(__file__).resolve().parents[2]


class ThisRepository(unittest.TestCase):
    maxDiff = None

    def test_has_sources_in_every_layer_below(self):
        seen = {source.folder for source in layers.sources(ROOT, "libfsdp")}
        self.assertLessEqual(set(layers.BELOW_TORCH) | {"shard", "models", "trainer"}, seen)

    def test_layers_only_point_down(self):
        order = list(layers.LAYERS)
        for folder, below in layers.LAYERS.items():
            for other in below:
                self.assertLess(order.index(other), order.index(folder), f"{folder} -> {other}")

    def test_nothing_below_the_line_may_include_what_stands_above(self):
        above = set(layers.LAYERS) - set(layers.BELOW_TORCH)
        for folder in layers.BELOW_TORCH:
            self.assertFalse(above & set(layers.LAYERS[folder]), folder)


def add_rule(rule):
    def test(self):
        self.assertEqual("", "\n".join(rule(ROOT)))

    setattr(ThisRepository, "test_no_" + rule.__name__, test)


for each in layers.RULES:
    add_rule(each)


class BrokenTrees(unittest.TestCase):
    def expect(self, rule, name, text, problem):
        """`rule` says `problem` about a tree with this one file, and nothing when the file is empty."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True)
            path.write_text(text)
            found = rule(Path(folder))
            self.assertEqual(1, len(found), found)
            self.assertIn(problem, found[0])
            path.write_text("#pragma once\n")
            self.assertEqual([], rule(Path(folder)))

    def test_upward_include(self):
        self.expect(layers.upward_includes, "libfsdp/plan/a.cpp", '#include "libfsdp/engine/executor.h"\n',
                    "libfsdp/plan/a.cpp:1: plan may not include")
        self.expect(layers.upward_includes, "libfsdp/kernels/a.cu", '\n#  include <libfsdp/shard/unit.h>\n',
                    "libfsdp/kernels/a.cu:2")
        self.expect(layers.upward_includes, "apps/finetune/a.cpp", '#include "libfsdp/engine/executor.h"\n',
                    "programs may not include")

    def test_upward_include_in_comm(self):
        self.expect(layers.upward_includes_in_comm, "libfsdp/comm/os/a.h", '#include "libfsdp/comm/control/control.h"\n',
                    "libfsdp/comm/os/a.h:1: comm/os may not include")
        self.expect(layers.upward_includes_in_comm, "libfsdp/comm/host/a.h", '#include "libfsdp/comm/device/b.h"\n',
                    "comm/host may not include")

    def test_torch_below_the_line(self):
        for header in ("torch/torch.h", "ATen/ATen.h", "c10/util/ArrayRef.h"):
            self.expect(layers.torch_below_the_line, "libfsdp/engine/a.h", f"#include <{header}>\n", header)

    def test_strategy_names(self):
        for name in ("FULL_SHARD", "kNoShard"):
            self.expect(layers.misplaced_strategies, "libfsdp/engine/a.cpp", f"if ({name}) {{}}\n", name)
            self.expect(layers.misplaced_strategies, "libfsdp/shard/sharded.cpp", f"if ({name}) {{}}\n", name)

    def test_odd_include_path(self):
        self.expect(layers.odd_include_paths, "libfsdp/base/a.cpp", '#include "error.h"\n', "repository root")
        self.expect(layers.odd_include_paths, "libfsdp/base/a.cpp", '#include "tests/support/a.h"\n', "tests/support")

    def test_guard(self):
        self.expect(layers.headers_without_guard, "libfsdp/base/a.h", "int a();\n", "libfsdp/base/a.h")

    def test_third_party_header_through_two_headers(self):
        with tempfile.TemporaryDirectory() as folder:
            io = Path(folder) / "libfsdp/io"
            trainer = Path(folder) / "libfsdp/trainer"
            io.mkdir(parents=True)
            trainer.mkdir(parents=True)
            (io / "node.h").write_text("#include <nlohmann/json.hpp>\n")
            (io / "json.h").write_text('#include "libfsdp/io/node.h"\n')
            (io / "json.cpp").write_text('#include "libfsdp/io/json.h"\n')
            self.assertEqual([], layers.leaking_third_parties(Path(folder)))
            (trainer / "a.cpp").write_text('#include "libfsdp/io/json.h"\n')
            found = layers.leaking_third_parties(Path(folder))
            self.assertEqual(1, len(found), found)
            self.assertIn("libfsdp/trainer/a.cpp:1", found[0])


if __name__ == "__main__":
    sys.exit(unittest.main())
