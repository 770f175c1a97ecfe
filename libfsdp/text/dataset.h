// Data files (.jsonl) as token sequences with labels.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/text/dataset_encoder.h"
#include "libfsdp/text/record.h"

namespace fsdp::text {

constexpr int32_t kIgnoredLabel = -100;

/// One record as tokens. labels[i] is input_ids[i] where token i is to be learnt, kIgnoredLabel
/// elsewhere; they are not shifted. labels[0] is always ignored: nothing predicts the first token.
struct Sample {
  std::vector<int32_t> input_ids;
  std::vector<int32_t> labels;

  int64_t tokens() const { return static_cast<int64_t>(input_ids.size()); }
  int64_t trainable_tokens() const;
};

struct DatasetOptions {
  bool train_on_inputs = false;   ///< learn prompts too, not the answers alone
  int64_t max_seq_length = 1024;  ///< longer records are cut on the right
  int64_t max_records = 0;        ///< read no more than these; 0 = all
};

struct DatasetReport {
  int64_t records = 0;    ///< read
  int64_t samples = 0;    ///< kept
  int64_t truncated = 0;  ///< kept, but cut at max_seq_length
  int64_t dropped = 0;    ///< left out: nothing to learn in them (any more)
  int64_t tokens = 0;     ///< of the samples
  int64_t trainable_tokens = 0;
};

struct Dataset {
  std::vector<Sample> samples;
  DatasetReport report;
};

/// Turns records into samples. Const functions may be called from several threads at once.
///
/// Conversations are rendered by the chat template and tokenised without further special tokens; a
/// token is learnt when any of its bytes are in an answer. Without a template, prompt and
/// completion are tokenised apart (so that the prompt has the tokens it has at inference) and
/// joined, and an eos follows. A text is followed by an eos, unless it has one.
class SampleEncoder {
 public:
  /// `encoder` must outlive this. Throws jinja::TemplateError for a broken template, ConfigError
  /// for a max_seq_length below 2.
  SampleEncoder(const TokenEncoder& encoder, const DatasetOptions& options);

  bool has_template() const { return template_ != nullptr; }

  /// The whole record. Throws DataError when the record needs a template that is not there, or does
  /// not suit it.
  Sample encode(const Record& record) const;

  /// Cuts at max_seq_length; true when something was cut off.
  bool truncate(Sample& sample) const;

 private:
  Sample encode_conversation(const Conversation& conversation) const;
  Sample encode_completion(const Record& record) const;
  Sample encode_text(const std::string& text) const;
  void append_eos(Sample& sample) const;

  const TokenEncoder& encoder_;
  DatasetOptions options_;
  std::unique_ptr<const ChatTemplate> template_;
};

/// Reads the .jsonl files in order.
/// Throws DataError: "file:line: reason" for broken JSON, unknown keys, wrong types; for a file
/// without records; for a set in which nothing can be learnt.
Dataset load_dataset(std::span<const std::string> files, const TokenEncoder& encoder,
                     const DatasetOptions& options);

/// "600 records: 598 samples, 81234 tokens (9876 trainable); 3 cut, 2 dropped".
std::string describe(const DatasetReport& report);

}  // namespace fsdp::text
