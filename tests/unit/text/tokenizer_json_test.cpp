// What a tokenizer.json must not say: each document here is refused with an error that names the
// place.
#include "libfsdp/text/tokenizer_json.h"

#include <gtest/gtest.h>

#include <functional>

#include "tests/unit/text/tokenizer_fixture.h"

namespace fsdp::text {
namespace {

std::string error_of(const std::string& text) {
  try {
    parse_tokenizer_json(text, "T");
  } catch (const ModelError& error) {
    return error.what();
  }
  return "no error";
}

std::string error_after(const std::function<void(Json&)>& change) {
  Json json = tiny_tokenizer();
  change(json);
  return error_of(json.dump());
}

#define EXPECT_REFUSED(change, fragment)                                                           \
  do {                                                                                             \
    const std::string error = error_after([](Json& j) { change; });                                \
    EXPECT_NE(error.find(fragment), std::string::npos) << "got: " << error << "\nafter: " #change; \
  } while (false)

TEST(TokenizerJsonTest, TheTinyTokenizerItselfIsAccepted) {
  EXPECT_EQ(error_of(tiny_tokenizer().dump()), "no error");
}

TEST(TokenizerJsonTest, UnknownComponentsAreNamed) {
  EXPECT_REFUSED(j["model"]["type"] = "Unigram", "no model 'Unigram'");
  EXPECT_REFUSED((j["normalizer"] = {{"type", "Precompiled"}}),
                 "T.normalizer: libfsdp has no normalizer 'Precompiled'");
  EXPECT_REFUSED((j["pre_tokenizer"] = {{"type", "BertPreTokenizer"}}),
                 "no pre_tokenizer 'BertPreTokenizer'");
  EXPECT_REFUSED((j["post_processor"] = {{"type", "RobertaProcessing"}}),
                 "no post_processor 'RobertaProcessing'");
  EXPECT_REFUSED((j["decoder"] = {{"type", "WordPiece"}}), "no decoder 'WordPiece'");
  EXPECT_REFUSED(j["version"] = "2.0", "unknown version");
  EXPECT_REFUSED(j["model"]["dropout"] = 0.1, "dropout");
  EXPECT_REFUSED(j["model"]["end_of_word_suffix"] = "</w>", "T.model.end_of_word_suffix");
  EXPECT_REFUSED(j["model"]["continuing_subword_prefix"] = "##",
                 "T.model.continuing_subword_prefix");
}

TEST(TokenizerJsonTest, NothingMayFollowByteLevel) {
  EXPECT_REFUSED(
      (j["pre_tokenizer"] = {{"type", "Sequence"},
                             {"pretokenizers", {j["pre_tokenizer"], {{"type", "Whitespace"}}}}}),
      "nothing may follow ByteLevel");
}

TEST(TokenizerJsonTest, IdsAreChecked) {
  EXPECT_REFUSED(j["model"]["vocab"]["x1"] = 5, "is there twice");
  EXPECT_REFUSED(j["model"]["vocab"]["x1"] = -1, "T.model.vocab: got -1");
  EXPECT_REFUSED(j["model"]["vocab"]["x1"] = int64_t{1} << 31, "T.model.vocab: got 2147483648");
  EXPECT_REFUSED(j["model"]["vocab"]["x1"] = 1.5, "expected an integer");
  EXPECT_REFUSED(j["model"]["vocab"]["x1"] = "7", "expected an integer");
  EXPECT_REFUSED(j["added_tokens"][0]["id"] = 5, "has id 5");
  EXPECT_REFUSED(j["added_tokens"][1]["id"] = 300, "makes it 262");
  EXPECT_REFUSED(j["added_tokens"][1]["content"] = "", "without content");
  EXPECT_REFUSED(j["added_tokens"][1] = j["added_tokens"][0], "added token '<s>'");
}

TEST(TokenizerJsonTest, MergesAreChecked) {
  EXPECT_REFUSED(j["model"]["merges"].push_back("h q"), "needs the token 'hq'");
  EXPECT_REFUSED(j["model"]["merges"].push_back("h"), "expected two tokens with one space");
  EXPECT_REFUSED(j["model"]["merges"].push_back("h e l"), "expected two tokens with one space");
  EXPECT_REFUSED(j["model"]["merges"].push_back(" he"), "needs the token ''");
  EXPECT_REFUSED((j["model"]["merges"].push_back({"h", "e", "l"})), "is neither");
  EXPECT_REFUSED(j["model"]["merges"].push_back(7), "is neither");
  EXPECT_REFUSED(j["model"]["unk_token"] = "<unk>", "unk_token '<unk>' is not in the vocabulary");
}

TEST(TokenizerJsonTest, MergesMayBePairsOrStrings) {
  Json json = tiny_tokenizer();
  json["model"]["merges"] = {"#version: 0.2", Json::array({"h", "e"}), "l l",
                             Json::array({"he", "ll"})};
  const auto tokenizer = Tokenizer::from_json(json.dump());
  EXPECT_EQ(tokenizer.encode("hello"), (std::vector<int32_t>{258, 'o'}));
}

TEST(TokenizerJsonTest, TemplatesAreChecked) {
  const auto with_single = [](Json single, Json special) {
    return error_after([&](Json& j) {
      j["post_processor"] = {
          {"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", special}};
    });
  };
  const Json token = Json::array({{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}});
  EXPECT_NE(with_single(token, Json::object()).find("'<s>' is not among special_tokens"),
            std::string::npos);
  const Json unknown = {{"<s>", {{"id", "<s>"}, {"ids", {9999}}, {"tokens", {"<s>"}}}}};
  EXPECT_NE(with_single(token, unknown).find("uses the id 9999"), std::string::npos);
  const Json second = Json::array({{{"Sequence", {{"id", "B"}, {"type_id", 0}}}}});
  EXPECT_NE(with_single(second, Json::object()).find("sequence A only"), std::string::npos);
}

TEST(TokenizerJsonTest, MalformedDocumentsAreRefused) {
  const std::string good = tiny_tokenizer().dump();
  EXPECT_NE(error_of("").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("[]").find("expected an object"), std::string::npos);
  EXPECT_NE(error_of(good.substr(0, good.size() / 2)).find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of(good + std::string(1, '\0') + good).find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of(good + good).find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("{\"model\":{},\"model\":{}}").find("'model' is there twice"),
            std::string::npos);
  EXPECT_NE(error_of(std::string(100000, '[')).find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("{\"version\":\"\xff\"}").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of(R"({"version":"\ud800"})").find("not valid JSON"), std::string::npos);
  EXPECT_NE(error_of("{\"a\":" + std::string(70, '[') + std::string(70, ']') + "}")
                .find("not valid JSON"),
            std::string::npos);
  EXPECT_NE(error_of("{}").find("T: 'model' is missing"), std::string::npos);
}

// Cut off or damaged at any place, a document is read or refused, and nothing worse.
TEST(TokenizerJsonTest, DamagedDocumentsNeverCrash) {
  const std::string good = tiny_tokenizer().dump();
  uint32_t state = 1;
  const auto random = [&](size_t n) {
    return (state = state * 1664525U + 1013904223U) / 65536U % n;
  };
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    for (size_t k = 0; k <= random(3); ++k) {
      const size_t at = random(2) == 0 ? random(bad.size())
                                       : bad.size() - 1 - random(std::min<size_t>(bad.size(), 400));
      bad[at] = "{}[]\",:0-1ex\\u \xff"[random(17)];
    }
    try {
      const auto tokenizer = Tokenizer::from_json(bad);
      tokenizer.decode(tokenizer.encode("hello <s> w\xc3\xb6rld<|end|>"));
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace fsdp::text
