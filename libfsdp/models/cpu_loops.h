// The element-wise and row-wise loops of a transformer block on the CPU. T is float, or uint16_t
// for bfloat16 bits; arithmetic is fp32 in any case. Serial: callers split rows between threads.
#pragma once

#include <cstdint>

namespace fsdp::models {

/// y = x * rstd * weight for each of `rows` rows of `width`; rstd[row] is kept for backward.
template <class T>
void rms_norm_rows(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
                   float eps);

/// dx, and d(weight) added into weight_grad [width].
template <class T>
void rms_norm_rows_backward(const T* x, const T* weight, const float* rstd, const T* dy, T* dx,
                            float* weight_grad, int64_t rows, int64_t width);

/// y = silu(gate) * up.
template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t n);
template <class T>
void swiglu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t n);

/// How a head's rows are rotated on the way; cos and sin [rows, width / 2], null for none.
struct Rotation {
  const float* cos = nullptr;
  const float* sin = nullptr;
};

/// to[row] = scale * rotate(from[row]): rows of one head, `stride` elements apart, into a dense
/// fp32 [rows, width].
template <class T>
void load_head(const T* from, int64_t stride, int64_t rows, int64_t width, Rotation rotation,
               float scale, float* to);

/// The gradient's way back: to[row] = scale * unrotate(from[row]).
template <class T>
void store_head(const float* from, int64_t rows, int64_t width, Rotation rotation, float scale,
                T* to, int64_t stride);

/// out[row] = sum over a row of a[row] * b[row].
void row_dots(const float* a, const float* b, int64_t rows, int64_t width, float* out);

/// to [columns, to_stride] = transposed from [rows, columns].
void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_stride);

/// In place for each row r of scores [rows, stride]: the first valid + r numbers become exp(s -
/// max), those up to `width` become 0. inverse_sum[r] = 1 / sum, log_sum[r] = max + log(sum).
void softmax_rows(float* scores, int64_t stride, int64_t rows, int64_t width, int64_t valid,
                  float* inverse_sum, float* log_sum);

/// to[row] = scale[row] * from[row], dense fp32 [rows, width] -> rows `stride` apart.
template <class T>
void store_scaled_rows(const float* from, const float* scale, int64_t rows, int64_t width, T* to,
                       int64_t stride);

/// Backward of softmax for a block of keys (rows) by queries (columns), in place:
/// p = exp(scores - log_sum[column]), 0 where column < row (the block starts on the diagonal);
/// scores = p, dp = p * (dp - dot[column]). Rows of both are `stride` apart.
void attention_weights_backward(float* scores, float* dp, int64_t stride, int64_t rows,
                                int64_t columns, const float* log_sum, const float* dot);

/// The negative log likelihood of `target` under the softmax of n logits, which lie in parts of
/// `width`, the last one shorter. With `gradient`, logits become its gradient.
template <class T>
double token_loss(T* const* parts, int64_t width, int64_t n, int64_t target, bool gradient);

/// One query against `count` cached keys and values [count, width]: out [width] = softmax(q k^T) v.
/// `scores` has room for `count` numbers. The query is scaled already.
void attend_one(const float* query, const float* keys, const float* values, int64_t count,
                int64_t width, float* scores, float* out);

}  // namespace fsdp::models
