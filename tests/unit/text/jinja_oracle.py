"""Renders the corpus with transformers' own Jinja2 environment: one JSON line a case, for jinja_oracle_test.cpp.

Usage: jinja_oracle.py CORPUS_DIR > cases.jsonl
Each line: {"name", "template", "context", "text", "spans"} or "error" in place of "text" and "spans".
"""

import datetime
import json
import pathlib
import sys

from transformers.utils import chat_template_utils as hf


class FixedTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 13, 5, 9)


hf.datetime = FixedTime


def render(template, context):
    compiled = hf._cached_compile_jinja_template(template)
    blocks, spans = [], []
    with compiled.environment.activate_tracker(blocks, spans):
        for block in compiled.generate(**context):
            blocks.append(block)
    text = "".join(blocks)
    return text, [[len(text[:at].encode()) for at in span] for span in spans]


def case(name, template, context):
    out = {"name": name, "template": template, "context": context}
    try:
        out["text"], out["spans"] = render(template, context)
    except Exception as error:  # every failure of the oracle must be a failure of the engine as well
        out["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(out))


def main():
    corpus = pathlib.Path(sys.argv[1])
    small = json.loads((corpus / "small_context.json").read_text())
    for path in sorted(corpus.glob("small_*.txt")):
        for number, template in enumerate(path.read_text().split("\n----\n")):
            case(f"{path.name}#{number + 1}", template.removesuffix("\n----"), small)
    chats = json.loads((corpus / "chats.json").read_text())
    for path in sorted(corpus.glob("*.jinja")):
        for chat in chats:
            name = chat.pop("name", None) or chat["_name"]
            chat["_name"] = name
            for prompt in (False, True):
                case(f"{path.name} {name} prompt={prompt}", path.read_text(), {**chat, "add_generation_prompt": prompt})


if __name__ == "__main__":
    main()
