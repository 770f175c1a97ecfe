#include "libfsdp/text/dataset.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "tests/unit/text/fake_encoder.h"

namespace fsdp::text {
namespace {

using Ids = std::vector<int32_t>;

class DatasetTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    path_ = (std::filesystem::temp_directory_path() /
             cat("fsdp_dataset_", info->name(), "_", getpid(), ".jsonl"))
                .string();
  }
  void TearDown() override { std::remove(path_.c_str()); }

  Dataset load(const std::string& lines, const FakeEncoder& encoder, DatasetOptions options = {}) {
    std::ofstream(path_, std::ios::binary) << lines;
    const std::vector<std::string> files = {path_};
    return load_dataset(files, encoder, options);
  }

  std::string error_of(const std::string& lines, const FakeEncoder& encoder = FakeEncoder(),
                       DatasetOptions options = {}) {
    try {
      load(lines, encoder, options);
      return "no error";
    } catch (const DataError& error) {
      const std::string text = error.what();
      EXPECT_TRUE(text.starts_with(path_)) << text;
      return text.substr(path_.size());
    }
  }

  std::string path_;
};

/// The text of what is learnt.
std::string learnt(const Sample& sample) {
  Ids ids;
  for (const int32_t label : sample.labels) {
    if (label != kIgnoredLabel) ids.push_back(label);
  }
  return FakeEncoder().decode(ids);
}

std::string text_of(const Sample& sample) { return FakeEncoder().decode(sample.input_ids); }

void expect_well_formed(const Dataset& data) {
  int64_t tokens = 0, trainable = 0;
  for (const Sample& sample : data.samples) {
    ASSERT_EQ(sample.input_ids.size(), sample.labels.size());
    EXPECT_EQ(sample.labels[0], kIgnoredLabel);
    for (size_t i = 0; i < sample.labels.size(); ++i) {
      EXPECT_TRUE(sample.labels[i] == kIgnoredLabel || sample.labels[i] == sample.input_ids[i]);
    }
    tokens += sample.tokens();
    trainable += sample.trainable_tokens();
  }
  EXPECT_EQ(data.report.samples, static_cast<int64_t>(data.samples.size()));
  EXPECT_EQ(data.report.tokens, tokens);
  EXPECT_EQ(data.report.trainable_tokens, trainable);
  EXPECT_EQ(data.report.records, data.report.samples + data.report.dropped);
}

TEST_F(DatasetTest, ConversationsLearnTheAnswersAndTheirEndOfTurn) {
  const Dataset data = load(
      R"({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1\n"}, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "Å2"}]})",
      FakeEncoder(kChatMl));
  ASSERT_EQ(data.samples.size(), 1U);
  EXPECT_EQ(text_of(data.samples[0]),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>"
            "assistant\nA1\n<|im_end|>\n"
            "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nÅ2<|im_end|>\n");
  EXPECT_EQ(learnt(data.samples[0]), "A1\n<|im_end|>Å2<|im_end|>");
  EXPECT_EQ(data.samples[0].labels.back(), kIgnoredLabel)
      << "the newline behind the last end of turn";
  expect_well_formed(data);
}

TEST_F(DatasetTest, ConversationsGetNoSecondBos) {
  const FakeEncoder encoder(std::string("{{ bos_token }}") + kChatMl, true, true);
  const Dataset data = load(
      R"({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})",
      encoder);
  EXPECT_EQ(data.samples[0].input_ids[0], FakeEncoder::kBos);
  EXPECT_NE(data.samples[0].input_ids[1], FakeEncoder::kBos);
  EXPECT_EQ(data.samples[0].input_ids.back(), '\n');
}

TEST_F(DatasetTest, PromptAndCompletionAreJoinedAndEndWithEosWithoutATemplate) {
  const Dataset data =
      load(R"({"prompt": "2+2=", "completion": "4"})", FakeEncoder("", true, true));
  EXPECT_EQ(text_of(data.samples[0]), "<s>2+2=4</s>");
  EXPECT_EQ(learnt(data.samples[0]), "4</s>");
  EXPECT_EQ(
      text_of(load(R"({"prompt": "a</s>", "completion": "b</s>"})", FakeEncoder()).samples[0]),
      "a</s>b</s>");
  EXPECT_EQ(learnt(load(R"({"prompt": "", "completion": "b"})", FakeEncoder()).samples[0]), "</s>");
}

TEST_F(DatasetTest, PromptAndCompletionBecomeTurnsWithATemplate) {
  const FakeEncoder encoder(kChatMl);
  const Dataset strings = load(R"({"prompt": "2+2=", "completion": "4"})", encoder);
  EXPECT_EQ(text_of(strings.samples[0]),
            "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n");
  EXPECT_EQ(learnt(strings.samples[0]), "4<|im_end|>");
  const Dataset lists = load(
      R"({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "d"}]})",
      encoder);
  EXPECT_EQ(learnt(lists.samples[0]), "d<|im_end|>");
}

TEST_F(DatasetTest, DialogueAndSummaryAskForASummary) {
  const std::string line = R"({"id": "1", "dialogue": "A: hi\r\nB: ho", "summary": "They greet."})";
  const Dataset plain = load(line, FakeEncoder());
  EXPECT_EQ(text_of(plain.samples[0]),
            "Summarize this dialog:\nA: hi\r\nB: ho\n---\nSummary:\nThey greet.</s>");
  EXPECT_EQ(learnt(plain.samples[0]), "They greet.</s>");
  EXPECT_EQ(text_of(load(line, FakeEncoder(kChatMl)).samples[0]),
            "<|im_start|>user\nSummarize this dialog:\nA: hi\r\nB: "
            "ho\n---\nSummary:\n<|im_end|>\n<|im_start|>assistant\n"
            "They greet.<|im_end|>\n");
}

TEST_F(DatasetTest, TextIsLearntWholeAndEndsWithOneEos) {
  EXPECT_EQ(text_of(load(R"({"text": "abc"})", FakeEncoder()).samples[0]), "abc</s>");
  EXPECT_EQ(learnt(load(R"({"text": "abc"})", FakeEncoder()).samples[0]), "bc</s>");
  EXPECT_EQ(text_of(load(R"({"text": "abc</s>"})", FakeEncoder()).samples[0]), "abc</s>");
  EXPECT_EQ(text_of(load(R"({"text": "abc"})", FakeEncoder(kChatMl, true, true)).samples[0]),
            "<s>abc</s>");
  EXPECT_EQ(learnt(load(R"({"text": "abc"})", FakeEncoder(kChatMl, true, true)).samples[0]),
            "abc</s>");
}

TEST_F(DatasetTest, TrainOnInputsLearnsAllButTheFirstToken) {
  const Dataset data =
      load(R"({"prompt": "ab", "completion": "c"})", FakeEncoder(), {.train_on_inputs = true});
  EXPECT_EQ(learnt(data.samples[0]), "bc</s>");
  expect_well_formed(data);
}

TEST_F(DatasetTest, LongRecordsAreCutAndThoseWithoutAnswerAreDropped) {
  const std::string lines =
      "{\"prompt\": \"abcd\", \"completion\": \"efgh\"}\n"
      "\n"
      "{\"prompt\": \"abcdefgh\", \"completion\": \"i\"}\r\n"
      "{\"prompt\": \"a\", \"completion\": \"b\"}";
  const Dataset data = load(lines, FakeEncoder(), {.max_seq_length = 6});
  ASSERT_EQ(data.samples.size(), 2U);
  EXPECT_EQ(text_of(data.samples[0]), "abcdef");
  EXPECT_EQ(learnt(data.samples[0]), "ef");
  EXPECT_EQ(data.report.records, 3);
  EXPECT_EQ(data.report.truncated, 1);
  EXPECT_EQ(data.report.dropped, 1);
  EXPECT_EQ(describe(data.report),
            "3 records: 2 samples, 9 tokens (4 trainable); 1 cut, 1 dropped");
  expect_well_formed(data);
  // Exactly as long as the limit: whole.
  EXPECT_EQ(load(R"({"prompt": "abc", "completion": "de"})", FakeEncoder(), {.max_seq_length = 6})
                .report.truncated,
            0);
}

TEST_F(DatasetTest, MaxRecordsTakesTheFirst) {
  const std::string lines = "{\"text\": \"one\"}\n{\"text\": \"two\"}\nbroken";
  EXPECT_EQ(load(lines, FakeEncoder(), {.max_records = 2}).report.records, 2);
}

TEST_F(DatasetTest, ErrorsNameFileAndLine) {
  EXPECT_TRUE(error_of("{\"text\": \"ok\"}\n{\"text\": \"ok\"").starts_with(":2: "))
      << error_of("{\"text\"");
  EXPECT_TRUE(error_of("\n[1]").starts_with(":2: ")) << error_of("\n[1]");
  EXPECT_EQ(error_of(R"({"txt": "a", "id": 1})"),
            ":1: no known keys; known are: messages; prompt and completion; dialogue and summary; "
            "text. The record has 'txt', "
            "'id'");
  EXPECT_EQ(error_of(R"({"text": 5})"), ":1: 'text' must be a string, got an integer");
  EXPECT_EQ(error_of(R"({"prompt": "a"})"), ":1: the record has 'prompt' but no 'completion'");
  EXPECT_EQ(error_of(R"({"summary": "a"})"), ":1: the record has 'summary' but no 'dialogue'");
  EXPECT_EQ(error_of(R"({"prompt": [{"role": "user", "content": "a"}], "completion": "b"})"),
            ":1: 'completion' must be a list of messages, as 'prompt' is, got a string");
  EXPECT_EQ(error_of(R"({"messages": "a"})"),
            ":1: 'messages' must be a list of messages, got a string");
  EXPECT_EQ(error_of(R"({"messages": []})"), ":1: 'messages' is an empty list");
  EXPECT_EQ(error_of(R"({"messages": [{"role": "user"}]})"), ":1: 'messages[0]' has no 'content'");
  EXPECT_EQ(error_of(R"({"messages": [{"content": "x"}]})"), ":1: 'messages[0]' has no 'role'");
  EXPECT_EQ(
      error_of(
          R"({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 1.5}]})"),
      ":1: 'messages[1].content' must be a string, got a number");
  EXPECT_TRUE(error_of(R"({"messages": [{"role": "user", "content": "x"}]})")
                  .starts_with(":1: the record has messages, but"));
  EXPECT_EQ(error_of(""), ": the file has no records");
  EXPECT_EQ(error_of("\n\n"), ": the file has no records");
  EXPECT_TRUE(error_of(R"({"messages": [{"role": "user", "content": "x"}]})", FakeEncoder(kChatMl))
                  .starts_with(": no token to train on in 1 records"));
}

TEST_F(DatasetTest, WhatTheTemplateRefusesIsAnErrorOfTheData) {
  const FakeEncoder encoder(
      "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}");
  const std::string text =
      error_of(R"({"messages": [{"role": "assistant", "content": "x"}]})", encoder);
  EXPECT_TRUE(text.starts_with(":1: ")) << text;
  EXPECT_NE(text.find("the user must begin"), std::string::npos) << text;
}

TEST_F(DatasetTest, AMissingFileIsAnError) {
  const std::vector<std::string> files = {path_};
  EXPECT_THROW(load_dataset(files, FakeEncoder(), {}), DataError);
}

}  // namespace
}  // namespace fsdp::text
