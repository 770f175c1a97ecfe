#include "libfsdp/text/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/unit/text/tokenizer_fixture.h"

namespace fsdp::text {
namespace {

using Ids = std::vector<int32_t>;

// <s> 0, </s> 1, <tool> 2, bytes from 3, then "12" 259, "he" 260, and e + acute as one token 261
// (no merge leads to it).
GgufVocabulary vocabulary(const std::string& pre) {
  GgufVocabulary out;
  out.model = "gpt2";
  out.pre = pre;
  out.chat_template = "{{ bos_token }}\n\"é\"";
  out.tokens = {"<s>", "</s>", "<tool>"};
  out.token_types = {3, 3, 4};
  for (int byte = 0; byte < 256; ++byte) {
    std::string token;
    unicode::append(token, byte_level_character(static_cast<uint8_t>(byte)));
    out.tokens.push_back(token);
  }
  for (const char* token : {"12", "he", "Ã©"}) out.tokens.emplace_back(token);
  out.token_types.resize(out.tokens.size(), 1);
  out.merges = {"1 2", "h e"};
  out.bos = 0;
  out.eos = out.pad = 1;
  return out;
}

int32_t byte_id(uint8_t byte) { return 3 + byte; }

Ids encode(const std::string& pre, std::string_view text) {
  return Tokenizer::from_gguf(vocabulary(pre)).encode(text);
}

TEST(GgufTokenizerTest, PreDecidesHowTextIsCut) {
  const Ids digits = {byte_id('1'), byte_id('2')}, merged = {259};
  EXPECT_EQ(encode("smollm", "12"), digits) << "each digit is a word of its own";
  EXPECT_EQ(encode("gpt-2", "12"), merged);
  EXPECT_EQ(encode("default", "12"), merged);
  EXPECT_EQ(encode("llama-bpe", "12"), merged);
  EXPECT_EQ(encode("qwen2", "12"), digits);
}

TEST(GgufTokenizerTest, LlamaTakesWholeWordsAndQwenComposes) {
  const Ids parts = {byte_id(0xc3), byte_id(0xa9)}, whole = {261};
  EXPECT_EQ(encode("llama-bpe", "\xc3\xa9"), whole) << "ignore_merges";
  EXPECT_EQ(encode("gpt-2", "\xc3\xa9"), parts);
  EXPECT_EQ(encode("qwen2", "e\xcc\x81"), parts) << "NFC";
  EXPECT_EQ(encode("gpt-2", "e\xcc\x81").size(), 3U);
}

TEST(GgufTokenizerTest, ControlTokensAreSpecialAndUserDefinedOnesAreNot) {
  const auto tokenizer = Tokenizer::from_gguf(vocabulary("smollm"));
  EXPECT_EQ(tokenizer.encode("he<tool></s>"), (Ids{260, 2, 1}));
  EXPECT_EQ(tokenizer.decode(Ids{260, 2, 1}, true), "he<tool>");
  EXPECT_EQ(tokenizer.eos_id(), 1);
  EXPECT_EQ(tokenizer.pad_id(), 1);
  EXPECT_EQ(tokenizer.bos_token(), "<s>");
  EXPECT_EQ(tokenizer.chat_template(), "{{ bos_token }}\n\"é\"");
}

TEST(GgufTokenizerTest, BosIsAddedOnlyWhenTheFileSaysSo) {
  GgufVocabulary with_bos = vocabulary("llama-bpe");
  with_bos.add_bos = true;
  EXPECT_EQ(Tokenizer::from_gguf(with_bos).encode("he"), (Ids{0, 260}));
  EXPECT_EQ(Tokenizer::from_gguf(with_bos).encode("he", false), Ids{260});
  EXPECT_EQ(encode("llama-bpe", "he"), Ids{260});
}

TEST(GgufTokenizerTest, WhatDoesNotFitIsRefused) {
  const auto refused = [](auto change) {
    GgufVocabulary bad = vocabulary("smollm");
    change(bad);
    EXPECT_THROW(Tokenizer::from_gguf(bad), ModelError);
  };
  refused([](auto& v) { v.model = "llama"; });
  refused([](auto& v) { v.pre = "deepseek-coder"; });
  refused([](auto& v) { v.tokens.clear(); });
  refused([](auto& v) { v.tokens[5] = "\xff"; });
  refused([](auto& v) { v.tokens[5] = v.tokens[6]; });
  refused([](auto& v) { v.token_types.pop_back(); });
  refused([](auto& v) { v.merges[0] = "1 nothing"; });
  refused([](auto& v) { v.merges[0] = "12"; });
  refused([](auto& v) { v.eos = static_cast<int64_t>(v.tokens.size()); });
  refused([](auto& v) { v.bos = -2; });
  refused([](auto& v) { v.chat_template = "\xc3"; });
}

// The files are for Hugging Face's tools: the tokenizers package must load them and agree.
TEST(GgufTokenizerTest, TheTokenizersPackageReadsTheFiles) {
  const std::string probe = cat("'", FSDP_PYTHON, "' -c 'import tokenizers' 2>/dev/null");
  if (std::system(probe.c_str()) != 0)
    GTEST_SKIP() << "no Python with the tokenizers package at " << FSDP_PYTHON;
  const std::string text = "<s>he 12 the\ncafe\xcc\x81 \xf0\x9f\x98\x80 123</s><tool>  x";
  for (const char* pre : {"smollm", "gpt-2", "llama-bpe", "qwen2"}) {
    GgufVocabulary source = vocabulary(pre);
    source.add_bos = true;
    const ScratchFolder folder(cat("gguf_", pre));
    const auto tokenizer = Tokenizer::from_gguf(source);
    tokenizer.save(folder.path());
    folder.write("text", text);
    const std::string command = cat(
        "cd '", folder.path().string(), "' && '", FSDP_PYTHON, "' -c \"import tokenizers, json; ",
        "t = tokenizers.Tokenizer.from_file('tokenizer.json'); "
        "json.load(open('tokenizer_config.json')); ",
        "json.dump(t.encode(open('text', newline='').read()).ids, open('ids', 'w'))\"");
    ASSERT_EQ(std::system(command.c_str()), 0);
    EXPECT_EQ(tokenizer.encode(text), Json::parse(folder.read("ids")).get<Ids>()) << pre;
    EXPECT_EQ(Tokenizer::from_directory(folder.path()).encode(text), tokenizer.encode(text));
  }
}

}  // namespace
}  // namespace fsdp::text
