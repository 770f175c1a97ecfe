#!/usr/bin/env python3
"""Makes a small summarising data set: a Debian package's long description -> its one-line synopsis.

Writes train.jsonl and validation.jsonl, records {"messages": [user, assistant]}. The texts come from Debian's own
package index (apt, in a folder of its own: the machine's lists are not touched, no root needed). Where there is no apt
or no network, a small generated set is written instead, and the program says so. The selection is a function of the
index: the same index gives the same files. No source package and no text occurs in both files.

Only the standard library is used.
"""

import argparse
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

INSTRUCTION = "Summarize this Debian package description in one short line."
MIN_DESCRIPTION, MAX_DESCRIPTION = 150, 580  # characters; with the chat template a sample stays below 256 tokens
MIN_SYNOPSIS, MAX_SYNOPSIS = 15, 80
UNWANTED = re.compile(r"transitional|dummy|debug(ging)? symbols|metapackage|meta-package|virtual package", re.I)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def apt_options(folder):
    return [
        "-o", "Acquire::Languages=en",
        "-o", f"Dir::State::lists={folder}/lists",
        "-o", "Dir::Cache::pkgcache=",
        "-o", "Dir::Cache::srcpkgcache=",
        "-o", "APT::Get::List-Cleanup=0",
    ]


def run(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True).stdout


def parse_stanza(stanza):
    """(package, source, synopsis, description) of one stanza of `apt-cache show`; None without an English text."""
    fields, last = {}, None
    for line in stanza.splitlines():
        if line.startswith(" ") and last:
            fields[last].append(line[1:])
        elif ": " in line or line.endswith(":"):
            last, _, value = line.partition(":")
            fields[last] = [value.strip()]
    text = fields.get("Description-en") or fields.get("Description")
    if not text or "Package" not in fields or len(text) < 2:
        return None
    package = fields["Package"][0]
    source = fields.get("Source", [package])[0].split(" ")[0]
    paragraphs, current = [], []
    for line in text[1:]:
        if line.strip() == ".":
            paragraphs.append(current)
            current = []
        else:
            current.append(line if line.startswith(" ") else line.strip())
    paragraphs.append(current)
    # Indented lines are lists: they keep their line breaks; flowing lines are joined.
    body = "\n\n".join(re.sub(r"\n(?! )", " ", "\n".join(lines)) for lines in paragraphs if lines)
    return package, source, text[0], body


def wanted(synopsis, body):
    if not MIN_SYNOPSIS <= len(synopsis) <= MAX_SYNOPSIS or not MIN_DESCRIPTION <= len(body) <= MAX_DESCRIPTION:
        return False
    # Accented and non-Latin letters cost several tokens each: the length in characters would not bound the tokens.
    return (synopsis + body).isascii() and not UNWANTED.search(synopsis) and not UNWANTED.search(body)


def from_debian(count):
    with tempfile.TemporaryDirectory(prefix="debian_index_") as folder:
        (pathlib.Path(folder) / "lists" / "partial").mkdir(parents=True)
        options = apt_options(folder)
        run(["apt-get", *options, "update"])
        names = sorted(set(run(["apt-cache", *options, "pkgnames"]).split()), key=digest)
        pairs, sources, seen = [], set(), set()
        for start in range(0, len(names), 1000):
            shown = run(["apt-cache", *options, "--no-all-versions", "show", *names[start:start + 1000]])
            stanzas = [s for s in map(parse_stanza, shown.split("\n\n")) if s]
            for package, source, synopsis, body in sorted(stanzas, key=lambda s: digest(s[0])):
                keys = {synopsis.lower(), body.lower()}
                if source in sources or keys & seen or not wanted(synopsis, body):
                    continue
                sources.add(source)
                seen |= keys
                pairs.append((source, body, synopsis))
                if len(pairs) == count:
                    return pairs
    raise RuntimeError(f"the index has only {len(pairs)} usable descriptions, {count} are needed")


def bundled(count):
    """A generated stand-in: invented packages whose description says what the synopsis says, in more words."""
    rng = random.Random(20240607)
    kinds = ["command-line tool", "graphical viewer", "shared library", "background service", "Python module",
             "terminal game", "text editor", "network monitor", "file converter", "desktop widget"]
    tasks = ["rename many files", "draw star maps", "compress sound recordings", "compare folders", "plan train trips",
             "count words", "watch disk usage", "mix colours", "solve sudoku puzzles", "read weather reports",
             "sort photographs", "track working hours", "convert units", "teach typing", "index recipes",
             "print labels", "edit subtitles", "test passwords", "plot measurements", "query bird songs"]
    extras = ["It starts in less than a second and needs no configuration.",
              "Results can be exported as plain text, as a table or as a picture.",
              "Every action can be undone, and a log of all changes is kept.",
              "The behaviour can be extended with small scripts written by the user.",
              "It works without a network connection and stores nothing outside of the home folder."]
    audience = ["beginners", "teachers", "scientists", "system administrators", "musicians", "translators"]
    pairs, seen = [], set()
    while len(pairs) < count:
        kind, task, people = rng.choice(kinds), rng.choice(tasks), rng.choice(audience)
        name = "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(3))
        if (kind, task, people) in seen or name in seen:
            continue
        seen |= {(kind, task, people), name}
        more = " ".join(rng.sample(extras, 2))
        body = (f"{name.capitalize()} is a {kind} that was written for {people}. With it one can {task} quickly and "
                f"without knowing the details of the formats behind it. {more}")
        pairs.append((name, body, f"{kind} to {task} for {people}"))
    return pairs


def record(body, synopsis):
    return {"messages": [{"role": "user", "content": f"{INSTRUCTION}\n\n{body}"},
                         {"role": "assistant", "content": synopsis}]}


def write(path, pairs):
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        for _, body, synopsis in pairs:
            out.write(json.dumps(record(body, synopsis), ensure_ascii=False) + "\n")
    temporary.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=int, default=600, help="records in train.jsonl")
    parser.add_argument("--validation", type=int, default=60, help="records in validation.jsonl")
    parser.add_argument("--source", choices=["auto", "debian", "bundled"], default="auto")
    arguments = parser.parse_args()
    count = arguments.train + arguments.validation
    origin, pairs = "Debian's package index", None
    if arguments.source != "bundled":
        try:
            if not shutil.which("apt-get"):
                raise RuntimeError("there is no apt-get here")
            pairs = from_debian(count)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as problem:
            if arguments.source == "debian":
                sys.exit(f"make_demo_data: error: {problem}")
            detail = getattr(problem, "stderr", "") or ""
            print(f"make_demo_data: Debian's index is not available ({problem}{' ' + detail.strip() if detail else ''})")
    if pairs is None:
        if count > 1000:
            sys.exit("make_demo_data: error: the generated set has at most 1000 records")
        origin, pairs = "a generated stand-in set, not real descriptions", bundled(count)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write(arguments.output_dir / "train.jsonl", pairs[:arguments.train])
    write(arguments.output_dir / "validation.jsonl", pairs[arguments.train:])
    print(f"make_demo_data: {arguments.train} + {arguments.validation} records from {origin} in {arguments.output_dir}")


if __name__ == "__main__":
    main()
