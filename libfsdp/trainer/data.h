// The records of a data file as micro-batches of the model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "libfsdp/models/batch.h"
#include "libfsdp/text/tokenizer.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::trainer {

/// How a file becomes micro-batches.
struct DataOptions {
  SequenceOptions sequence;
  int64_t batch_size = 8;  ///< Sequences of a micro-batch.
  bool shuffle = false;    ///< Without: the order of the file.
  int64_t seed = 0;
  std::optional<int64_t> max_records;
};

/// A data file, tokenised; every rank holds all of it. Not thread-safe: it keeps the order of the
/// last epoch.
class SequenceData {
 public:
  /// Cost: tokenises the whole file.
  /// Throws: DataError for a missing file, a broken line (file:line), a record without known keys,
  /// or a set without any trainable token.
  static SequenceData open(const std::filesystem::path& file, const text::Tokenizer& tokenizer,
                           const DataOptions& options);
  ~SequenceData();
  SequenceData(SequenceData&&) noexcept;
  SequenceData& operator=(SequenceData&&) noexcept;

  /// Records that are used (neither dropped nor beyond max_records).
  int64_t samples() const;
  int64_t trainable_tokens() const;
  /// A digest of all sequences: their tokens, labels and order in the file.
  std::string digest() const;
  /// "600 records: 598 samples, 81234 tokens (9876 trainable); 3 cut, 2 dropped; 75 micro-batches".
  std::string summary() const;

  /// Micro-batches of one epoch; the last may have fewer sequences.
  int64_t micro_batches() const;
  /// Micro-batch `m` of `epoch`, as the model takes it.
  models::CausalLmBatch micro_batch(int64_t epoch, int64_t m) const;
  /// Sequences in it.
  int64_t sequences_of(int64_t m) const;

 private:
  struct Impl;
  explicit SequenceData(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace fsdp::trainer
