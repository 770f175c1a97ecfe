// The input of a causal language model, and where its documents begin and end.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace fsdp::models {

class KvCache;

/// Tokens [begin, end) of the flat token axis that attend to each other, causally, and to nothing
/// else.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;
};

/// The documents of one call, end to end: spans[0].begin == 0, each begins where the previous ends.
struct AttentionSpans {
  std::vector<Span> spans;
  /// Generation only: keys and values of earlier tokens. Then there is one span, the new tokens.
  std::shared_ptr<KvCache> cache;

  int64_t tokens() const { return spans.empty() ? 0 : spans.back().end; }
};

/// A document inside a padded batch: columns [begin, end) of one row.
struct DocumentSpan {
  int64_t row = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

/// What one micro-batch computes on: only the tokens that are in some document, laid end to end (N
/// of them). Padding is left out here and costs nothing afterwards.
struct CausalLmBatch {
  at::Tensor input_ids;     ///< int64 [N]
  at::Tensor position_ids;  ///< int64 [N]
  at::Tensor loss_rows;     ///< int64 [M]: tokens whose next token is trained on.
  at::Tensor loss_targets;  ///< int64 [M]: those next tokens.
  std::shared_ptr<const AttentionSpans> spans;

  int64_t tokens() const { return input_ids.numel(); }
  int64_t trainable_tokens() const { return loss_rows.numel(); }
  CausalLmBatch to(at::Device device) const;
};

/// Builds a batch from row-major [rows, length] arrays. `labels` are aligned with input_ids (the
/// shift is done here); -100 means "not trained on". The last token of each document predicts
/// nothing. `position_ids` may be empty: then positions count from 0 in each document. Tokens
/// outside every document are padding.
///
/// Cost:   one pass over the arrays; CPU tensors.
/// Throws: DataError when sizes disagree, when documents overlap or are not in order, or are out of
/// range.
CausalLmBatch make_batch(int64_t rows, int64_t length, std::span<const int64_t> input_ids,
                         std::span<const int64_t> labels, std::span<const int64_t> position_ids,
                         std::span<const DocumentSpan> documents);

/// The same for [B, T] int64 tensors in which every row is one document without padding.
CausalLmBatch make_batch(const at::Tensor& input_ids, const at::Tensor& labels);

}  // namespace fsdp::models
