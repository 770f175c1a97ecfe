// Operations whose backward writes a sharded parameter's gradient straight into the slot that it is
// reduced from: no gradient tensor, no copy. Without sharding they are the plain operations. Where
// a weight has an adapter (weight_adapter.h) that computes instead; base_*: not even then.
#pragma once

#include <ATen/core/Tensor.h>

namespace fsdp {

/// input @ weight^T + bias, as at::linear. Shapes: [..., in], [out, in], [out] or undefined ->
/// [..., out].
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias = {});
at::Tensor base_linear(const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& bias = {});

/// weight[ids]: ids int64 [N] -> [N, D]. `tied`: another operation gives the weight a dense
/// gradient in the same backward; then this one's, which touches N rows, is a sparse tensor
/// wherever it has to be one.
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& ids, bool tied = false);
at::Tensor base_embedding(const at::Tensor& weight, const at::Tensor& ids, bool tied = false);

}  // namespace fsdp
