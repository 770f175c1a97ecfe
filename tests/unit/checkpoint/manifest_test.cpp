#include "libfsdp/checkpoint/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "libfsdp/base/error.h"
#include "tests/support/checkpoint_cases.h"

namespace fsdp {
namespace {

using checkpoint::digest_of;
using checkpoint::Manifest;
using checkpoint::parse_list;
using checkpoint::parse_manifest;
using checkpoint::WrittenRange;
using ::testing::HasSubstr;

Manifest example() {
  Manifest manifest;
  manifest.step = 120;
  manifest.world_size = 2;
  manifest.time = "2026-02-28T12:34:56Z";
  manifest.strategy = "FULL_SHARD \"quoted\"";
  manifest.files = {{"a/b.safetensors", 100}, {"model.safetensors", 1LL << 40}};
  manifest.lists = {{"manifest-00001-of-00002.json", 10, digest_of("a")},
                    {"manifest-00002-of-00002.json", 20, digest_of("b")}};
  manifest.details = io::Json::object({{"lr", 0.5}, {"name", "x"}});
  return manifest;
}

/// `text` with another digest at its end, the right one.
std::string resealed(const std::string& text) {
  const size_t end = text.rfind(",\n\"manifest_digest\": \"");
  const std::string body = text.substr(0, end);
  return cat(body, ",\n\"manifest_digest\": \"", digest_of(body).hex(), "\"\n}\n");
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  check(at != std::string::npos, cat("no '", from, "' in the text"));
  return resealed(text.replace(at, from.size(), to));
}

std::string refusal(const std::string& text) {
  try {
    parse_manifest(text, "DIR/manifest.json");
  } catch (const ModelError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ManifestTest, ReadsWhatItWrote) {
  const Manifest manifest = example();
  const Manifest read = parse_manifest(manifest_text(manifest), "x");
  EXPECT_EQ(read.step, 120);
  EXPECT_EQ(read.world_size, 2);
  EXPECT_EQ(read.time, manifest.time);
  EXPECT_EQ(read.strategy, manifest.strategy);
  EXPECT_EQ(read.files, manifest.files);
  EXPECT_EQ(read.lists, manifest.lists);
  EXPECT_EQ(read.details, manifest.details);
  EXPECT_EQ(manifest_text(read), manifest_text(manifest));
}

TEST(ManifestTest, IsOneJsonDocument) {
  const io::Json document = io::Json::parse(manifest_text(example()), "x");
  EXPECT_EQ(document["files"][1]["bytes"].as_int(), 1LL << 40);
  EXPECT_EQ(document["manifest_digest"].as_string().size(), 32U);
}

TEST(ManifestTest, NoBitMayDiffer) {
  const std::string text = manifest_text(example());
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    std::string changed = text;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << bit % 8));
    EXPECT_THAT(refusal(changed), HasSubstr("DIR/manifest.json")) << "bit " << bit;
  }
  for (size_t bytes = 0; bytes < text.size(); ++bytes)
    EXPECT_NE(refusal(text.substr(0, bytes)), "accepted") << bytes;
  EXPECT_NE(refusal(text + "\n"), "accepted");
}

TEST(ManifestTest, HostileDocumentsWithTheRightDigestAreRefused) {
  const std::string text = manifest_text(example());
  ASSERT_EQ(refusal(resealed(text)), "accepted");
  const std::vector<std::pair<std::string, std::string>> changes = {
      {"a/b.safetensors", "../b.safetensors"},
      {"a/b.safetensors", "/etc/passwd"},
      {"a/b.safetensors", "model.safetensors"},
      {"a/b.safetensors", "z"},
      {"\"bytes\": 100", "\"bytes\": -1"},
      {"\"bytes\": 100", "\"bytes\": 9223372036854775807"},
      {"\"bytes\": 100", "\"bytes\": 1e3"},
      {"\"bytes\": 100", "\"bytes\": 99999999999999999999"},
      {"\"world_size\": 2", "\"world_size\": 3"},
      {"\"world_size\": 2", "\"world_size\": 1000000000"},
      {"\"world_size\": 2", "\"world_size\": 0"},
      {"\"step\": 120", "\"step\": -120"},
      {"\"step\": 120", "\"step\": \"120\""},
      {"\"version\": 1", "\"version\": 2"},
      {"fsdp checkpoint", "another program"},
      {"manifest-00002-of-00002.json", "manifest-00001-of-00002.json"},
      {digest_of("a").hex(), "no digest"},
      {"\"files\": [", "\"files\": [{}, "},
      {"\"time\"", "\"tim\""}};
  for (const auto& [from, to] : changes) {
    EXPECT_THAT(refusal(replaced(text, from, to)), HasSubstr("DIR/manifest.json"))
        << from << " -> " << to;
  }
}

/// `text` with a few random changes of bytes that its parser knows.
std::string scrambled(std::string text, std::mt19937& random) {
  constexpr std::string_view kBytes = "{}[]\",:0123456789-+.eE\\u/tfn \n\x80\xff";
  for (size_t changes = 1 + random() % 4; changes > 0 && !text.empty(); --changes) {
    const size_t at = random() % text.size();
    switch (random() % 4) {
      case 0:
        text.erase(at, 1 + random() % 20);
        break;
      case 1:
        text.insert(at, text.substr(random() % text.size(), random() % 60));
        break;
      default:
        text[at] = kBytes[random() % kBytes.size()];
    }
  }
  return text;
}

TEST(ManifestTest, ScrambledDocumentsAreReadOrRefused) {
  std::mt19937 random(20260228);
  const std::string manifest = manifest_text(example());
  const std::string body = manifest.substr(0, manifest.rfind(",\n\"manifest_digest"));
  const std::vector<WrittenRange> ranges = {{"x", "a.weight", 0, 5, digest_of("1")},
                                            {"dir/y", "", 7, 1LL << 50, digest_of("2")}};
  const std::string list = checkpoint::list_text(ranges);
  int accepted = 0;
  for (int i = 0; i < (testing::long_run() ? 1'000'000 : 20'000); ++i) {
    const std::string text = scrambled(body, random);
    accepted += refusal(cat(text, ",\n\"manifest_digest\": \"", digest_of(text).hex(),
                            "\"\n}\n")) == "accepted";
    try {
      for (const WrittenRange& range : parse_list(scrambled(list, random), "x")) {
        ASSERT_TRUE(checkpoint::is_safe_name(range.file));
        ASSERT_GE(range.begin + range.bytes, range.bytes);
      }
    } catch (const ModelError&) {
    }
  }
  EXPECT_GT(accepted, 0);  // In the time, the strategy, the details.
}

TEST(ManifestTest, ListsOfRangesAreRead) {
  const std::vector<WrittenRange> ranges = {{"x", "a.weight", 0, 5, digest_of("1")},
                                            {"dir/y", "", 7, 1LL << 50, digest_of("2")}};
  EXPECT_EQ(parse_list(checkpoint::list_text(ranges), "x"), ranges);
  EXPECT_TRUE(parse_list(checkpoint::list_text({}), "x").empty());
}

TEST(ManifestTest, HostileListsAreRefused) {
  const std::string digest = digest_of("1").hex();
  for (const std::string& range :
       {cat("[\"../x\", \"t\", 0, 5, \"", digest, "\"]"),
        cat("[\"x\", \"t\", -1, 5, \"", digest, "\"]"),
        cat("[\"x\", \"t\", 0, 0, \"", digest, "\"]"), cat("[\"x\", \"t\", 0, 5, \"\"]"),
        cat("[\"x\", \"t\", 9223372036854775807, 5, \"", digest, "\"]"),
        cat("[\"x\", 3, 0, 5, \"", digest, "\"]"), cat("[\"x\", \"t\", 0, \"", digest, "\"]"),
        std::string("3"), std::string("{")}) {
    EXPECT_THROW(parse_list(cat("{\"ranges\": [", range, "]}"), "x"), ModelError) << range;
  }
  EXPECT_THROW(parse_list("[]", "x"), ModelError);
}

}  // namespace
}  // namespace fsdp
