"""Writes small tokenizers and what the `tokenizers` package makes of a hard corpus with them.

usage: tokenizer_oracle.py DIR

DIR/<name>/tokenizer.json is trained here on a generated text; DIR/<name>/cases.json holds a list of
{text, ids, ids_special, spans, decoded, decoded_skip}, with spans in bytes, or null where a normalizer changed the text.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

WORDS = """the of and a to in is you that it he was for on are as with his they I at be this have from or one had by
word but not what all were we when your can said there use an each which she do how their if will up other about out
many then them these so some her would make like him into time has look two more write go see number no way could people
don't it's we'll I'm they've you'd O'Brien's naïve café résumé über straße señor façade Привет мир как дела 東京 日本語
北京 中文 文字 한국어 안녕 हिन्दी नमस्ते العربية سلام שלום ไทย ελληνικά return int void std::vector self.x __init__ def
class import lambda => != == && || ++i x[i] {} () printf("%d\\n", 42); 3.14159 0xff 1e-5 12345 2024 10,000""".split()

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]


def training_lines(count=3000):
    rng = random.Random(7)
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 20))
        yield rng.choice(["", "", "    ", "\t"]) + rng.choice([" ", " ", "  "]).join(words) + rng.choice([".", "!\n", "\r\n"])


def corpus():
    texts = [
        "", " ", "  ", "   x", "x   ", "\n", "\r\n", "\n\n\n", " \n", "\n ", "\t\t\tif x:\n\t\t\t\treturn", "a\n\n b\n  \n c",
        "   \n   \n", "x \t \r\n y", "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g", "a\u180eb \u180e c\u180e \u180e", "\u180e\u180e  \u180e",
        "[\u180e]", " \u180e", "\u180e \n", "don't DON'T I'LL we've 'S's ''s 's'", "it’s 'ſ 'K \u212a'\u212a 'Ve'RE'd'D'm'M'lL", "'", "''", "'t", "'re're",
        "0 1 12 123 1234 12345 1234567890", "3.14159e-10 0x1F 1,000,000 ½ ² ₃ ⅷ Ⅻ ① ㊿ ٣٤٥ १२३ １２３ 𝟘𝟙𝟚 𒐀 ੧੨", "a1b22c333d4444",
        "👩‍👩‍👧‍👦 👩🏽‍🚀 🇩🇪🇫🇷 ✌️ ❤️‍🔥 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣", "e\u0301 a\u030a\u0323 \u0301x ñ n\u0303 \u212b \u2126 ﬁ ǆ", "Z\u0351\u036b\u0343a\u0300\u0301\u0302\u0303l\u0327\u0301g\u0316\u0317o",
        "\u1100\u1161\u11a8 각 \u1112\u1161\u11ab 한 \uac00\u11a8", "\u0958 क\u093c \u0929 \u09c7\u09be \u0b47\u0b57 \u0dd9\u0dcf \u1025\u102e", "\uf900 \ufa10 豈 \u2f800".replace("\u2f800", "\U0002f800"),
        "東京特許許可局、局長の 中文测试。「引用」ｶﾀｶﾅ 한국어 테스트", "مرحبا بِالعَالَمِ ١٢٣ שָׁלוֹם עולם \u200fRTL\u200e mixed עברית and English", "ไทยไม่มีช่องว่าง ภาษาไทย ລາວ မြန်မာ ខ្មែរ",
        "हिन्दी क्षत्रिय தமிழ் తెలుగు ಕನ್ನಡ മലയാളം", "\0", "a\0b\0\0c", "\0\n\0 \0", "\x01\x02\x1b[31mred\x7f", "\ufeffBOM", "\ufffd\uffff\U0010ffff\ue000\ufdd0",
        "def f(x):\n    return x**2 + 1  # comment\n\n\nclass A(B):\n\tpass\n", "for(int i=0;i<n;++i){a[i]+=b[i]*c;}//x\r\n#include <x.h>",
        "https://example.com/a/b?c=d&e=%20f#g user@example.org {\"k\": [1, 2.5, null], \"s\": \"\\u00e9\\n\"}", "aGVsbG8gd29ybGQ=" * 20,
        "a" * 5000, "ab" * 1500, "word " * 500, " " * 3000, " " * 1000 + "x", "\n" * 1000, "\t " * 500, "1" * 2000, "!" * 2000, "é" * 1000, "e\u0301" * 700, "😀" * 500,
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "<|endoftext|><|endoftext|>", " <|im_end|> ", "x<|im_end|>y", "<|im_<|im_start|>|>",
        "<|im_end", "<|im_end|", "|im_end|>", "<|IM_END|>", "<tool>call</tool> <tool_call>x</tool_call>", "  <mask>  x <mask>y<mask>", "\t<mask>\n<mask>", "lefty  <left>  end<left>",
        "  <right>   next <right>\n\nz", "word solo words solo solow wsolo solo. (solo) _solo solo_ solo\u0301 \u00e9solo ½solo solo\u200d ⓐsolo", "Norm NORM norm café\u0301 CAFE\u0301 cafe\u0301 café caf\u00e9x",
        "İstanbul I\u0307 ß ẞ ΣΑΣ ς ǅ K Å", "a  b   c    d", "--- *** ### ===\n---", "...!!!???", " ,.;:", "“quotes” ‘single’ «guillemets» —dash– … • ‰ € £ ¥ © ®", "ⓐⓑⓒ 🄰🄱 ℀ ℵ ª º ʰ ː ̈ ١", "x\u200by\u200cz\u200dw\u2060v",
        "ﷺ ﷽ ꙮ 𒈙 𝒳𝓎𝔷 𠀀𪚥 \U000e0001", "The quick brown fox jumps over the lazy dog. " * 5, "▁▁ ▁x ▁", "Ġ Ċ ĠĠ Ń ł", "<0x41><0x0A> <0xZZ>", "\u0130\u0131\u017f", "a\u0345b \u1fb3", "Straße STRASSE ﬀ ſt ŉ",
    ]
    rng = random.Random(11)
    pools = [
        [chr(c) for c in range(32, 127)], [" ", "\n", "\t", "\r", "\u00a0", "\u3000", "a", "1"], WORDS + SPECIALS + ["<mask>", "solo", "<left>", "<right>", " ", "\n"],
        [chr(c) for c in range(0x300, 0x370)] + list("aeioun "), [chr(c) for c in range(0x1100, 0x1200)] + ["가", "x"],
        [chr(c) for c in range(0x0900, 0x0e00)], [chr(c) for c in range(0xa0, 0x250)], [chr(c) for c in range(0x2000, 0x2c00)], [chr(c) for c in range(0x1f000, 0x1fa00)] + ["\u200d", "\ufe0f"],
    ]
    for n in range(270):
        pool = pools[n % len(pools)]
        texts.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 60))))
    letters = [w for w in WORDS if w.isascii() and w.isalpha()]
    for n in range(60):  # words of many symbols, where the order of the merges matters
        parts = letters if n % 2 else "etaoinshrdlu"
        texts.append("".join(rng.choice(parts) for _ in range(rng.randint(30, 300))))
    for mark in [0x7FD, 0x898, 0x8D0, 0x1ABF, 0x1DF6, 0x10EAB, 0x10F46, 0x1E08F, 0x1E130]:  # newer than the normalizer
        texts.append(f"a{chr(mark)}\u0301\u0323 e\u0301{chr(mark)}\u0323")
    texts.append("\U00011935\U00011930 \U00011938 \U00016121\U0001611f")
    for _ in range(60):
        points = (rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)]) for _ in range(40))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


def byte_level_bpe(pre, normalizer=None, post=None, vocab=1200, alphabet=True, added=()):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre
    if normalizer:
        tok.normalizer = normalizer
    tok.decoder = decoders.ByteLevel()
    initial = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet else []
    tok.train_from_iterator(training_lines(), trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIALS,
                                                                  initial_alphabet=initial, show_progress=False))
    tok.add_tokens(list(added))
    if post:
        tok.post_processor = post(tok)
    return tok


def character_bpe(pre, normalizer=None, decoder=None, specials=SPECIALS, **options):
    tok = Tokenizer(models.BPE(**options))
    if pre:
        tok.pre_tokenizer = pre
    if normalizer:
        tok.normalizer = normalizer
    if decoder:
        tok.decoder = decoder
    tok.train_from_iterator(training_lines(), trainers.BpeTrainer(vocab_size=1200, special_tokens=specials,
                                                                  limit_alphabet=150, show_progress=False))
    return tok


def bos_template(tok):
    bos = SPECIALS[3]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tok.token_to_id(bos))])


def with_extra_words(tok, words):
    """The same tokenizer with words in its vocabulary that no merge leads to, and ignore_merges."""
    data = json.loads(tok.to_str())
    added = {t["content"] for t in data["added_tokens"]}
    assert all(data["model"]["vocab"].get(c) is not None for c in added)
    for word in words:
        data["model"]["vocab"][word] = len(data["model"]["vocab"])
    data["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(data))


def tokenizers():
    byte_level = pre_tokenizers.ByteLevel
    bare = byte_level(add_prefix_space=False, use_regex=False)
    odd_tokens = [AddedToken("<mask>", lstrip=True, normalized=False), AddedToken("<left>", lstrip=True, normalized=True),
                  AddedToken("<right>", rstrip=True, normalized=False), AddedToken("solo", single_word=True, normalized=False),
                  AddedToken("Norm", normalized=True), AddedToken("caf\u00e9", normalized=True), AddedToken("<tool>", normalized=False),
                  AddedToken("<tool_call>", normalized=False), AddedToken("  ", normalized=True)]
    yield "gpt2", byte_level_bpe(byte_level(add_prefix_space=False))
    yield "gpt2_prefix", byte_level_bpe(byte_level(add_prefix_space=True), added=odd_tokens[:4])
    yield "smollm", byte_level_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]))
    llama3 = byte_level_bpe(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bare]),
                            post=lambda t: processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_template(t)]))
    yield "llama3", with_extra_words(llama3, ["Ġfox", "Ġjumps", "jumps", "ĠĠĠĠĠĠĠĠ", "örd"])
    yield "qwen2", byte_level_bpe(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), bare]), normalizers.NFC(), added=odd_tokens)
    yield "lower", byte_level_bpe(byte_level(add_prefix_space=False), normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), added=odd_tokens)
    yield "splits", byte_level_bpe(pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
        pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.Split(Regex(r"[,.;!]"), "merged_with_previous"),
        pre_tokenizers.Split(Regex(r"[a-f]"), "contiguous"), pre_tokenizers.Split(Regex(r"\n"), "removed"), bare]))
    yield "inverted", byte_level_bpe(pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+|\s+$|^#"), "isolated", invert=True), pre_tokenizers.Split(Regex(r"\b[xyz]|\h\h"), "merged_with_previous"),
        pre_tokenizers.Split(Regex(r"[\s\d]|\W\S"), "merged_with_next", invert=True), pre_tokenizers.Digits(), bare]))
    yield "holes", byte_level_bpe(byte_level(add_prefix_space=False), alphabet=False)
    llama2_decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llama2_tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + SPECIALS
    llama2 = character_bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), llama2_decoder,
                           specials=llama2_tokens, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    data = json.loads(llama2.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    yield "llama2", Tokenizer.from_str(json.dumps(data))
    yield "metaspace", character_bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), decoder=decoders.Metaspace(prepend_scheme="first"),
                                     specials=["<unk>"] + SPECIALS, unk_token="<unk>")
    yield "metaspace_fused", character_bpe(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(replacement="_", prepend_scheme="always", split=False), pre_tokenizers.Digits()]),
                                           decoder=decoders.Metaspace(replacement="_"), specials=["<unk>"] + SPECIALS, unk_token="<unk>", fuse_unk=True)
    yield "words", character_bpe(pre_tokenizers.Whitespace(), specials=["<unk>"] + SPECIALS, unk_token="<unk>", fuse_unk=True)


def byte_spans(text, offsets):
    starts = [0]
    for c in text:
        starts.append(starts[-1] + len(c.encode()))
    return [[starts[b], starts[e]] for b, e in offsets]


def case_of(tok, text):
    plain = tok.encode(text, add_special_tokens=False)
    changed = tok.normalizer is not None and tok.normalizer.normalize_str(text) != text
    special = tok.encode(text, add_special_tokens=True).ids
    return {"text": text, "ids": plain.ids, "ids_special": special, "spans": None if changed else byte_spans(text, plain.offsets),
            "decoded": tok.decode(special, skip_special_tokens=False), "decoded_skip": tok.decode(special, skip_special_tokens=True)}


def main():
    out = Path(sys.argv[1])
    texts = corpus()
    for name, tok in tokenizers():
        (out / name).mkdir(parents=True, exist_ok=True)
        tok.save(str(out / name / "tokenizer.json"))
        tok = Tokenizer.from_file(str(out / name / "tokenizer.json"))
        cases = [case_of(tok, text) for text in texts]
        (out / name / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
