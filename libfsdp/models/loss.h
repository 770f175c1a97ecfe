// Vocabulary projection and cross entropy in one operation.
#pragma once

#include <ATen/core/Tensor.h>

namespace fsdp::models {

/// Sum over i of -log softmax(hidden[rows[i]] weight^T)[targets[i]].
///
/// Shapes: hidden [N, D], weight [V, D], rows and targets int64 [M] -> fp32 [] (double for double
/// inputs). Memory: logits of one block of rows (at most 64 MiB in fp32, and at least 64 rows;
/// with a frozen weight on the CPU at most 128 rows), never all of them. Where gradients
///         are on, they are computed here, block by block, and kept for backward: d(hidden) and
///         d(weight).
/// Throws: DataError for a target outside the vocabulary.
at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& rows, const at::Tensor& targets);

/// Sum over i of -log softmax(logits[i])[targets[i]], for a head that is no plain matrix. Shapes:
/// logits [M, V], targets int64 [M] -> as above. Memory: the logits twice more, and their gradient.
/// Throws: DataError likewise.
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace fsdp::models
