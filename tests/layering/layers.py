"""Who may include whom, read from the sources; docs/architecture.md explains why."""

import re
from pathlib import Path

# Each folder of libfsdp and the folders that it may include, besides itself. Lower ones stand first.
LAYERS = {
    "base": [],
    "plan": ["base"],
    "io": ["base"],
    "device": ["base"],
    "kernels": ["base", "device"],
    "comm": ["base", "device", "kernels"],
    "optim": ["base", "device", "kernels"],
    "checkpoint": ["base", "plan", "io", "kernels", "comm"],
    "engine": ["base", "plan", "device", "kernels", "comm", "optim"],
    "text": ["base", "io"],
    "gloo": ["base", "kernels", "comm"],
    "shard": ["base", "plan", "io", "device", "kernels", "comm", "optim", "checkpoint", "engine"],
    "lora": ["base", "plan", "io", "kernels", "comm", "checkpoint", "text", "shard"],
    "models": ["base", "io", "device", "kernels", "shard", "lora"],
    "trainer": ["base", "plan", "io", "device", "kernels", "comm", "optim", "checkpoint", "engine", "text",
                "gloo", "shard", "lora", "models"],
}
# Likewise the folders of comm, besides what lies beside them: the interface and what joins all parts.
COMM_LAYERS = {
    "os": [],
    "control": ["os"],
    "host": ["os", "control"],
    "device": ["os", "control"],
    "launch": ["os", "control", "host", "device"],
}
BELOW_TORCH = ["base", "plan", "io", "device", "kernels", "comm", "optim", "checkpoint", "engine", "text"]
# Programs stand on the trainer; what it hands out (errors, options, json) they may name too.
PROGRAMS = ["base", "io", "comm", "device", "gloo", "trainer"]

TORCH = re.compile(r"^(torch|ATen|c10)/")
THIRD_PARTY = re.compile(r"^(nlohmann|simdjson|yaml-cpp|spdlog|fmt|CLI)[/.]")
STRATEGIES = re.compile(r"\b(FULL_SHARD|SHARD_GRAD_OP|HYBRID_SHARD|NO_SHARD"
                        r"|kFullShard|kShardGradOp|kHybridShard|kNoShard)\b")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


class Source:
    """One file: its path below the root, its folder of libfsdp (or None) and its includes."""

    def __init__(self, root: Path, path: Path):
        self.name = path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        parts = self.name.split("/")
        self.folder = parts[1] if parts[0] == "libfsdp" and len(parts) > 2 else None
        self.includes = []  # (line, opening character, path)
        for number, line in enumerate(self.text.splitlines(), 1):
            if found := INCLUDE.match(line):
                self.includes.append((number, found.group(1), found.group(2)))


def sources(root: Path, *folders: str) -> list[Source]:
    return [Source(root, path) for folder in folders for path in sorted((root / folder).rglob("*"))
            if path.suffix in SUFFIXES]


def folder_of(include: str) -> str | None:
    parts = include.split("/")
    return parts[1] if parts[0] == "libfsdp" and len(parts) > 2 else None


def upward_includes(root: Path) -> list[str]:
    """Includes of a folder that does not stand below."""
    problems = []
    for source in sources(root, "libfsdp"):
        if source.folder is None:
            continue
        if source.folder not in LAYERS:
            problems.append(f"{source.name}: folder '{source.folder}' has no place in the layers")
            continue
        for line, _, include in source.includes:
            folder = folder_of(include)
            if folder and folder != source.folder and folder not in LAYERS[source.folder]:
                problems.append(f"{source.name}:{line}: {source.folder} may not include {include}")
    for source in sources(root, "apps"):
        for line, _, include in source.includes:
            folder = folder_of(include)
            if folder and folder not in PROGRAMS:
                problems.append(f"{source.name}:{line}: programs may not include {include}")
    return problems


def upward_includes_in_comm(root: Path) -> list[str]:
    """Likewise between the folders of comm."""
    def part_of(path):
        parts = path.split("/")
        return parts[2] if parts[:2] == ["libfsdp", "comm"] and len(parts) > 3 else None

    return [f"{source.name}:{line}: comm/{part_of(source.name)} may not include {include}"
            for source in sources(root, "libfsdp") if part_of(source.name)
            for line, _, include in source.includes
            if part_of(include) not in (None, part_of(source.name), *COMM_LAYERS.get(part_of(source.name), []))]


def torch_below_the_line(root: Path) -> list[str]:
    return [f"{source.name}:{line}: {include} below the torch line"
            for source in sources(root, "libfsdp") if source.folder in BELOW_TORCH
            for line, _, include in source.includes if TORCH.match(include)]


def misplaced_strategies(root: Path) -> list[str]:
    """Names of strategies outside plan and what stands above shard's interface, its options included."""
    problems = []
    for source in sources(root, "libfsdp"):
        if source.folder in ("plan", "trainer") or source.name.startswith("libfsdp/shard/options."):
            continue
        for number, line in enumerate(source.text.splitlines(), 1):
            if found := STRATEGIES.search(line):
                problems.append(f"{source.name}:{number}: {found.group(1)} is named here; "
                                "read the plan's values instead")
    return problems


def odd_include_paths(root: Path) -> list[str]:
    """Quoted includes that do not start at the repository root, and library code that includes tests or programs."""
    problems = []
    for source in sources(root, "libfsdp", "apps", "tests", "benchmarks", "examples"):
        library = source.name.startswith("libfsdp/")
        for line, opening, include in source.includes:
            legal = ("libfsdp/",) if library else ("libfsdp/", source.name.split("/")[0] + "/", "tests/")
            if opening == '"' and not include.startswith(legal):
                problems.append(f'{source.name}:{line}: "{include}" does not start at the repository root')
    return problems


def leaking_third_parties(root: Path) -> list[str]:
    """Headers that need a third party's header and can be reached from outside their folder."""
    files = {source.name: source for source in sources(root, "libfsdp", "apps", "tests")}
    tainted = {name for name, source in files.items()
               if name.endswith(".h") and any(THIRD_PARTY.match(i) for _, _, i in source.includes)}
    grown = True
    while grown:
        more = {name for name, source in files.items()
                if name.endswith(".h") and any(i in tainted for _, _, i in source.includes)}
        grown = not more <= tainted
        tainted |= more
    return [f"{source.name}:{line}: {include} brings a third party's header out of its folder"
            for source in files.values() for line, _, include in source.includes
            if include in tainted and folder_of(include) and folder_of(include) != source.folder]


def headers_without_guard(root: Path) -> list[str]:
    return [f"{source.name}: no #pragma once" for source in sources(root, "libfsdp", "apps", "tests")
            if source.name.endswith(".h") and "#pragma once" not in source.text]


RULES = [upward_includes, upward_includes_in_comm, torch_below_the_line, misplaced_strategies, odd_include_paths,
         leaking_third_parties, headers_without_guard]
