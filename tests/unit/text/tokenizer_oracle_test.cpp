// Ids, spans and decoded text against the `tokenizers` package, on tokenizers that
// tokenizer_oracle.py trains.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/text/tokenizer.h"
#include "libfsdp/text/unicode.h"

namespace fsdp::text {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

bool oracle_exists() {
  const std::string probe = cat("'", FSDP_PYTHON, "' -c 'import tokenizers' 2>/dev/null");
  return fs::exists(FSDP_PYTHON) && std::system(probe.c_str()) == 0;
}

// Runs the script once for all test processes that run at the same time, and again when the script
// changes.
fs::path oracle_directory() {
  const fs::path directory = FSDP_ORACLE_DIR,
                 script = fs::path(FSDP_TEST_DIR) / "tokenizer_oracle.py";
  fs::create_directories(directory);
  const int lock = ::open((directory / "lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  EXPECT_EQ(::flock(lock, LOCK_EX), 0);
  const fs::path done = directory / "done";
  if (!fs::exists(done) || fs::last_write_time(done) < fs::last_write_time(script)) {
    const std::string command =
        cat("'", FSDP_PYTHON, "' '", script.string(), "' '", directory.string(), "'");
    if (std::system(command.c_str()) == 0) std::ofstream(done) << "ok\n";
  }
  ::close(lock);
  return fs::exists(done) ? directory : fs::path();
}

std::vector<size_t> character_starts(std::string_view text) {
  std::vector<size_t> starts;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i == text.size() || (static_cast<uint8_t>(text[i]) & 0xc0) != 0x80) starts.push_back(i);
  }
  return starts;
}

// The oracle counts characters: a token of half a character gets the whole of it.
ByteSpan whole_characters(const std::vector<size_t>& starts, ByteSpan span) {
  const auto after = std::upper_bound(starts.begin(), starts.end(), span.begin);
  return {*std::prev(after), *std::lower_bound(starts.begin(), starts.end(), span.end)};
}

std::string streamed(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                     bool skip_special) {
  StreamDecoder stream = tokenizer.stream_decoder(skip_special);
  std::string out;
  for (const int32_t id : ids) {
    const std::string part = stream.push(id);
    EXPECT_EQ(unicode::first_invalid(part), std::string_view::npos)
        << "half a character was handed out";
    out += part;
  }
  return out + stream.finish();
}

class TokenizerOracleTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!oracle_exists())
      GTEST_SKIP() << "no Python with the tokenizers package at " << FSDP_PYTHON;
    const fs::path root = oracle_directory();
    ASSERT_FALSE(root.empty()) << "tokenizer_oracle.py failed";
    directory_ = root / GetParam();
    std::ifstream(directory_ / "cases.json") >> cases_;
    ASSERT_GT(cases_.size(), 300U);
  }

  static std::string label(const Json& text) { return cat("text ", text.dump().substr(0, 300)); }

  fs::path directory_;
  Json cases_;
};

TEST_P(TokenizerOracleTest, IdsAreIdentical) {
  const auto tokenizer = Tokenizer::from_directory(directory_);
  for (const Json& item : cases_) {
    const auto text = item["text"].get<std::string>();
    ASSERT_EQ(tokenizer.encode(text, false), item["ids"].get<std::vector<int32_t>>())
        << label(item["text"]);
    ASSERT_EQ(tokenizer.encode(text, true), item["ids_special"].get<std::vector<int32_t>>())
        << label(item["text"]);
  }
}

TEST_P(TokenizerOracleTest, SpansAreIdenticalUpToCharacters) {
  const auto tokenizer = Tokenizer::from_directory(directory_);
  const bool has_prefix = std::string_view(GetParam()) == "gpt2_prefix";
  const bool drops_bytes =
      std::string_view(GetParam()) == "holes";  // where the package's offsets slip
  const bool inserts = std::string_view(GetParam()).starts_with("metaspace");
  size_t num_compared = 0;
  for (const Json& item : cases_) {
    const auto text = item["text"].get<std::string>();
    const Encoding encoding = tokenizer.encode_with_offsets(text, false);
    ASSERT_EQ(encoding.ids, item["ids"].get<std::vector<int32_t>>());
    ASSERT_EQ(encoding.spans.size(), encoding.ids.size());
    if (item["spans"].is_null() || drops_bytes) continue;
    const auto starts = character_starts(text);
    for (size_t i = 0; i < encoding.ids.size(); ++i) {
      const ByteSpan span = encoding.spans[i];
      if (span.begin == span.end && (has_prefix || inserts))
        continue;  // the space that was put in front
      const ByteSpan expected{item["spans"][i][0].get<size_t>(), item["spans"][i][1].get<size_t>()};
      ASSERT_EQ(whole_characters(starts, span), expected)
          << label(item["text"]) << " token " << i << ": " << span.begin << ".." << span.end;
      ++num_compared;
    }
  }
  // llama2's normalizer changes every text.
  if (!drops_bytes && std::string_view(GetParam()) != "llama2") {
    EXPECT_GT(num_compared, 5000U);
  }
}

TEST_P(TokenizerOracleTest, DecodedTextIsIdenticalAlsoWhenStreamed) {
  const auto tokenizer = Tokenizer::from_directory(directory_);
  const bool joins_with_spaces = std::string_view(GetParam()) == "words";  // no decoder at all
  for (const Json& item : cases_) {
    const auto ids = item["ids_special"].get<std::vector<int32_t>>();
    const auto decoded = item["decoded"].get<std::string>(),
               skipped = item["decoded_skip"].get<std::string>();
    ASSERT_EQ(tokenizer.decode(ids, false), decoded) << label(item["text"]);
    ASSERT_EQ(tokenizer.decode(ids, true), skipped) << label(item["text"]);
    if (joins_with_spaces) continue;
    ASSERT_EQ(streamed(tokenizer, ids, false), decoded) << label(item["text"]);
    ASSERT_EQ(streamed(tokenizer, ids, true), skipped) << label(item["text"]);
  }
}

TEST_P(TokenizerOracleTest, ThreadsShareOneTokenizer) {
  const auto tokenizer = Tokenizer::from_directory(directory_);
  std::atomic<int> num_wrong = 0;
  const auto work = [&](size_t first) {
    for (size_t i = 0; i < cases_.size(); ++i) {
      const Json& item = cases_[(first + i) % cases_.size()];
      if (tokenizer.encode(item["text"].get<std::string>(), false) !=
          item["ids"].get<std::vector<int32_t>>())
        ++num_wrong;
    }
  };
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) threads.emplace_back(work, t * cases_.size() / 4);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(num_wrong, 0);
}

INSTANTIATE_TEST_SUITE_P(Trained, TokenizerOracleTest,
                         ::testing::Values("gpt2", "gpt2_prefix", "smollm", "llama3", "qwen2",
                                           "lower", "splits", "inverted", "holes", "llama2",
                                           "metaspace", "metaspace_fused", "words"),
                         [](const auto& info) {
                           std::string name;
                           bool up = true;
                           for (const char* c = info.param; *c != '\0'; ++c) {
                             if (*c != '_') name += up ? static_cast<char>(std::toupper(*c)) : *c;
                             up = *c == '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace fsdp::text
