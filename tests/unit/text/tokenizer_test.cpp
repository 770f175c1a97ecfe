#include "libfsdp/text/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>

#include "tests/unit/text/tokenizer_fixture.h"

namespace fsdp::text {
namespace {

using Ids = std::vector<int32_t>;

Tokenizer tiny() { return Tokenizer::from_json(tiny_tokenizer().dump()); }

TEST(TokenizerTest, MergesByRankWithinWords) {
  EXPECT_EQ(tiny().encode("hello world"), (Ids{259, 260, 'o', 'r', 'l', 'd'}));
  EXPECT_EQ(tiny().encode("shell"), (Ids{'s', 258}));
  EXPECT_EQ(tiny().encode("lll"), (Ids{257, 'l'}));
  EXPECT_EQ(tiny().encode(""), Ids{});
}

TEST(TokenizerTest, AddedTokensAreFoundInTheText) {
  EXPECT_EQ(tiny().encode("hello<|end|><s>he<|end"),
            (Ids{259, 262, 261, 256, '<', '|', 'e', 'n', 'd'}));
}

TEST(TokenizerTest, SpansAreTheBytesOfTheText) {
  const Encoding encoding = tiny().encode_with_offsets("héllo<s> w");
  EXPECT_EQ(encoding.ids, (Ids{'h', 0xc3, 0xa9, 257, 'o', 261, 260}));
  const std::vector<ByteSpan> expected = {{0, 1}, {1, 2}, {2, 3}, {3, 5}, {5, 6}, {6, 9}, {9, 11}};
  EXPECT_EQ(encoding.spans, expected);
}

TEST(TokenizerTest, SpansSeeThroughNormalization) {
  Json json = tiny_tokenizer();
  json["normalizer"] = {{"type", "Sequence"},
                        {"normalizers",
                         {{{"type", "NFC"}},
                          {{"type", "Replace"}, {"pattern", {{"String", "--"}}}, {"content", ""}},
                          {{"type", "Prepend"}, {"prepend", "hello"}}}}};
  const std::string text = "e\xcc\x81--xy";  // e + acute composes, the dashes vanish
  const Encoding encoding = Tokenizer::from_json(json.dump()).encode_with_offsets(text);
  EXPECT_EQ(encoding.ids, (Ids{259, 0xc3, 0xa9, 'x', 'y'}));
  const std::vector<ByteSpan> expected = {{0, 0}, {0, 3}, {0, 3}, {5, 6}, {6, 7}};
  EXPECT_EQ(encoding.spans, expected);
}

TEST(TokenizerTest, TemplatesAddTheirTokensOnlyWhenAsked) {
  Json json = tiny_tokenizer();
  const auto special = [](const char* id) {
    return Json{{"SpecialToken", {{"id", id}, {"type_id", 0}}}};
  };
  json["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single",
       {special("<s>"), {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, special("<|end|>")}},
      {"pair", Json::array()},
      {"special_tokens",
       {{"<s>", {{"id", "<s>"}, {"ids", {261}}, {"tokens", {"<s>"}}}},
        {"<|end|>", {{"id", "<|end|>"}, {"ids", {262}}, {"tokens", {"<|end|>"}}}}}}};
  const auto tokenizer = Tokenizer::from_json(json.dump());
  EXPECT_EQ(tokenizer.encode("hello", true), (Ids{261, 259, 262}));
  EXPECT_EQ(tokenizer.encode("hello", false), Ids{259});
  const std::vector<ByteSpan> expected = {{0, 0}, {0, 5}, {5, 5}};
  EXPECT_EQ(tokenizer.encode_with_offsets("hello", true).spans, expected);
}

TEST(TokenizerTest, DecodeInvertsEncodeAndSkipsSpecialTokens) {
  const auto tokenizer = tiny();
  const std::string text = "<s>hello wörld \xf0\x9f\x98\x80<|end|>";
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text), true), "hello wörld \xf0\x9f\x98\x80");
  EXPECT_EQ(tokenizer.decode(Ids{259, 99999, -1}), "hello");
  EXPECT_EQ(tokenizer.decode(Ids{0xf0, 0x9f, 'x', 0xff}), "\xef\xbf\xbdx\xef\xbf\xbd");
}

TEST(TokenizerTest, StreamNeverHandsOutHalfACharacter) {
  auto stream = tiny().stream_decoder(true);
  EXPECT_EQ(stream.push(259), "hello");
  EXPECT_EQ(stream.push(261), "");
  EXPECT_EQ(stream.push(0xf0), "");
  EXPECT_EQ(stream.push(0x9f), "");
  EXPECT_EQ(stream.push(0x98), "");
  EXPECT_EQ(stream.push(0x80), "\xf0\x9f\x98\x80");
  EXPECT_EQ(stream.push(0xe2), "");
  EXPECT_EQ(stream.push('x'), "\xef\xbf\xbdx");
  EXPECT_EQ(stream.push(0xc3), "");
  EXPECT_EQ(stream.finish(), "\xef\xbf\xbd");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TokenizerTest, KnowsItsVocabulary) {
  const auto tokenizer = tiny();
  EXPECT_EQ(tokenizer.vocab_size(), 263U);
  EXPECT_EQ(tokenizer.id_limit(), 263);
  EXPECT_EQ(tokenizer.id_of("hello"), 259);
  EXPECT_EQ(tokenizer.id_of("<s>"), 261);
  EXPECT_EQ(tokenizer.id_of("none"), std::nullopt);
  EXPECT_EQ(tokenizer.token_of(260), "Ġw");
  EXPECT_EQ(tokenizer.token_of(262), "<|end|>");
  EXPECT_EQ(tokenizer.token_of(263), std::nullopt);
  EXPECT_TRUE(tokenizer.is_special(261));
  EXPECT_FALSE(tokenizer.is_special(259));
  ASSERT_EQ(tokenizer.special_tokens().size(), 2U);
  EXPECT_EQ(tokenizer.special_tokens()[1].content, "<|end|>");
}

TEST(TokenizerTest, RejectsTextThatIsNotUtf8) {
  const auto tokenizer = tiny();
  for (const char* text : {"a\xff", "\xc3", "\xed\xa0\x80", "\xed\xb0\x80", "\xc0\xaf",
                           "\xf4\x90\x80\x80", "longer text \x80"}) {
    EXPECT_THROW(tokenizer.encode(text), DataError) << text;
  }
}

TEST(TokenizerTest, ReadsTheFilesBesideTokenizerJson) {
  const ScratchFolder folder("tokenizer_files");
  folder.write("tokenizer.json", tiny_tokenizer().dump());
  folder.write(
      "tokenizer_config.json",
      R"({"bos_token": {"content": "<s>", "special": true}, "eos_token": "<|end|>", "pad_token": null,
                   "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]})");
  folder.write("special_tokens_map.json",
               R"({"pad_token": {"content": "<|end|>"}, "eos_token": "<s>"})");
  folder.write("generation_config.json", R"({"eos_token_id": [262, 261]})");
  const auto tokenizer = Tokenizer::from_directory(folder.path());
  EXPECT_EQ(tokenizer.bos_id(), 261);
  EXPECT_EQ(tokenizer.eos_id(), 262) << "tokenizer_config.json wins over special_tokens_map.json";
  EXPECT_EQ(tokenizer.pad_id(), 262);
  EXPECT_EQ(tokenizer.pad_token(), "<|end|>");
  EXPECT_EQ(tokenizer.unk_id(), std::nullopt);
  EXPECT_EQ(tokenizer.stop_ids(), (Ids{262, 261}));
  EXPECT_EQ(tokenizer.chat_template(), "D");
  folder.write("chat_template.jinja", "{{ beside }}");
  EXPECT_EQ(Tokenizer::from_directory(folder.path()).chat_template(), "{{ beside }}");
}

TEST(TokenizerTest, SavesTheSourceFilesAsTheyAre) {
  const ScratchFolder source("tokenizer_source"), target("tokenizer_target");
  const std::string json = tiny_tokenizer().dump(3) + "\n\n";
  source.write("tokenizer.json", json);
  source.write("chat_template.jinja", "{{ x }}\n");
  source.write("merges.txt", "#version: 0.2\n");
  source.write("model.safetensors", "not ours");
  const auto tokenizer = Tokenizer::from_directory(source.path());
  tokenizer.save(target.path());
  tokenizer.save(source.path());  // onto itself
  EXPECT_EQ(target.read("tokenizer.json"), json);
  EXPECT_EQ(source.read("tokenizer.json"), json);
  EXPECT_EQ(target.read("chat_template.jinja"), "{{ x }}\n");
  const auto files = std::filesystem::directory_iterator(target.path());
  EXPECT_EQ(std::distance(begin(files), end(files)), 3)
      << "nothing else is copied, nothing temporary is left";
  EXPECT_THROW(tokenizer.save(target.path() / "missing" / "folder" / "tokenizer.json"), Error);
}

TEST(TokenizerTest, MissingTokenizerJsonIsNamed) {
  const ScratchFolder folder("tokenizer_missing");
  try {
    Tokenizer::from_directory(folder.path());
    FAIL() << "no error";
  } catch (const ModelError& error) {
    EXPECT_NE(std::string(error.what()).find("no tokenizer.json in"), std::string::npos);
  }
}

// Each text is 2 MB made to hurt: one word, one run of spaces, one run of marks in the wrong order.
TEST(TokenizerTest, LongRunsTakeLinearTime) {
  Json json = tiny_tokenizer();
  json["normalizer"] = {{"type", "NFC"}};
  const auto tokenizer = Tokenizer::from_json(json.dump());
  constexpr size_t kBytes = 2 << 20;
  std::string marks = "a";
  while (marks.size() < kBytes) marks += "\xcc\x81\xcc\xa3";
  std::string hell;
  while (hell.size() < kBytes) hell += "hell";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(tokenizer.encode(hell).size(), hell.size() / 4);
  EXPECT_EQ(tokenizer.encode(std::string(kBytes, ' ')).size(), kBytes);
  EXPECT_EQ(tokenizer.encode(std::string(kBytes, '\n') + "x").size(), kBytes + 1);
  EXPECT_GT(tokenizer.encode(marks).size(), kBytes / 2);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_LT(seconds.count(), 60) << "quadratic time would be hours";
}

}  // namespace
}  // namespace fsdp::text
