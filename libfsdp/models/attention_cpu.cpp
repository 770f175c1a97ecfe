#include "libfsdp/models/attention_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "libfsdp/base/checked.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/cpu_loops.h"
#include "libfsdp/models/prefix_attention.h"
#include "libfsdp/models/small_gemm.h"

namespace fsdp::models {
namespace {

// Note [Attention in blocks] A piece of work is one span and one KV head with the query heads that
// share it. Its rows are brought into dense fp32 scratch, rotated on the way and padded with zeros
// to whole blocks, so that nearly all products have one shape. "Panels" are blocks of 64 rows,
// transposed: [d, 64].
//   forward:  S = Q K^T by rows of 64 queries, softmax over keys up to the diagonal, O = P V.
//   backward: by rows of 64 keys, transposed, so that no tile is turned around:
//             S^T = K Q^T, P^T = exp(S^T - log_sum), dV += P^T dO, dP^T = V dO^T,
//             dS^T = P^T (dP^T - rowsum(dO O)), dK += dS^T Q, dQ^T += K^T dS^T.
// Padded queries have log_sum = infinity, hence P = 0.
constexpr int64_t kBlock = 64;
constexpr int64_t kChunk =
    512;  // Longest inner dimension of one product: bounds the number of kernels.

/// One thread's fp32 scratch: a bump allocator over one tensor.
class Scratch {
 public:
  explicit Scratch(int64_t numel)
      : buffer_(at::empty({numel}, at::kFloat)), next_(out<float>(buffer_)) {}
  float* take(int64_t numel) {
    float* result = next_;
    next_ += round_up(numel, 16);
    return result;
  }

 private:
  at::Tensor buffer_;
  float* next_;
};

struct Piece {
  int64_t begin, tokens, padded, group;
};

std::vector<Piece> pieces_of(const AttentionInputs& in) {
  std::vector<Piece> pieces;
  for (size_t s = 0; s + 1 < in.bounds.size(); ++s) {
    const int64_t tokens = in.bounds[s + 1] - in.bounds[s];
    for (int64_t group = 0; tokens > 0 && group < in.shape.num_kv_heads; ++group) {
      pieces.push_back({in.bounds[s], tokens, round_up(tokens, kBlock), group});
    }
  }
  return pieces;
}

int64_t longest(const std::vector<Piece>& pieces) {
  int64_t most = 0;
  for (const Piece& piece : pieces) most = std::max(most, piece.padded);
  return most;
}

/// One head's rows of a [N, heads * d] tensor.
struct HeadView {
  const at::Tensor& tensor;
  int64_t head, width;
  int64_t stride() const { return tensor.size(1); }
  int64_t at(int64_t row) const { return row * stride() + head * width; }
};

Rotation rotation_at(const AttentionInputs& inputs, int64_t row) {
  const int64_t at = row * (inputs.shape.head_dim / 2);
  return {in<float>(inputs.cos) + at, in<float>(inputs.sin) + at};
}

void load_padded(const HeadView& head, const Piece& piece, Rotation rotation, float scale,
                 float* to) {
  for_cpu_type(head.tensor, [&](auto tag) {
    using T = decltype(tag);
    load_head(in<T>(head.tensor) + head.at(piece.begin), head.stride(), piece.tokens, head.width,
              rotation, scale, to);
  });
  std::fill(to + piece.tokens * head.width, to + piece.padded * head.width, 0.0F);
}

void store_rows(const float* from, int64_t row, int64_t rows, const HeadView& head,
                Rotation rotation, float scale) {
  for_cpu_type(head.tensor, [&](auto tag) {
    using T = decltype(tag);
    store_head(from, rows, head.width, rotation, scale, out<T>(head.tensor) + head.at(row),
               head.stride());
  });
}

/// rows [padded, d] -> padded / 64 panels [d, 64].
void make_panels(const float* rows, int64_t padded, int64_t d, float* panels) {
  for (int64_t r = 0; r < padded; r += kBlock)
    transpose(rows + r * d, kBlock, d, panels + r * d, kBlock);
}

/// c [64, d] (+)= weights [64, n] (rows `stride` apart) rows [n, d].
void weigh_rows(const float* weights, int64_t stride, const float* rows, int64_t n, int64_t d,
                float* c, bool accumulate) {
  for (int64_t k = 0; k < n; k += kChunk) {
    small_gemm(kBlock, d, std::min(kChunk, n - k), weights + k, stride, rows + k * d, d, c, d,
               accumulate || k > 0);
  }
}

/// scores [64, n] (rows `stride` apart) = rows [64, d] panels[0 .. n / 64).
void multiply_panels(const float* rows, const float* panels, int64_t n, int64_t d, float* scores,
                     int64_t stride) {
  for (int64_t p = 0; p < n; p += kBlock) {
    small_gemm(kBlock, kBlock, d, rows, d, panels + p * d, kBlock, scores + p, stride, false);
  }
}

float softmax_scale(const AttentionShape& shape) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

class ForwardPiece {
 public:
  ForwardPiece(const AttentionInputs& inputs, const AttentionResult& result, int64_t most)
      : in_(inputs),
        result_(result),
        d_(inputs.shape.head_dim),
        scratch_(most * (4 * d_ + kBlock) + kBlock * (d_ + 2) + 128),
        q_(scratch_.take(most * d_)),
        k_(scratch_.take(most * d_)),
        v_(scratch_.take(most * d_)),
        k_panels_(scratch_.take(most * d_)),
        scores_(scratch_.take(most * kBlock)),
        out_(scratch_.take(kBlock * d_)),
        inverse_sum_(scratch_.take(kBlock)),
        log_sum_(scratch_.take(kBlock)) {}

  void run(const Piece& piece) {
    load_padded({in_.k, piece.group, d_}, piece, rotation_at(in_, piece.begin), 1.0F, k_);
    load_padded({in_.v, piece.group, d_}, piece, {}, 1.0F, v_);
    make_panels(k_, piece.padded, d_, k_panels_);
    const int64_t per_group = in_.shape.num_heads / in_.shape.num_kv_heads;
    for (int64_t h = 0; h < per_group; ++h) run_head(piece, piece.group * per_group + h);
  }

 private:
  void run_head(const Piece& piece, int64_t head) {
    load_padded({in_.q, head, d_}, piece, rotation_at(in_, piece.begin), softmax_scale(in_.shape),
                q_);
    float* log_sum = out<float>(result_.log_sum) + head * result_.log_sum.size(1) + piece.begin;
    for (int64_t row = 0; row < piece.tokens; row += kBlock) {
      const int64_t width = row + kBlock, rows = std::min(kBlock, piece.tokens - row);
      multiply_panels(q_ + row * d_, k_panels_, width, d_, scores_, piece.padded);
      softmax_rows(scores_, piece.padded, kBlock, width, row + 1, inverse_sum_, log_sum_);
      weigh_rows(scores_, piece.padded, v_, width, d_, out_, false);
      std::copy(log_sum_, log_sum_ + rows, log_sum + row);
      const HeadView to{result_.out, head, d_};
      for_cpu_type(to.tensor, [&](auto tag) {
        using T = decltype(tag);
        store_scaled_rows(out_, inverse_sum_, rows, d_,
                          out<T>(to.tensor) + to.at(piece.begin + row), to.stride());
      });
    }
  }

  const AttentionInputs& in_;
  const AttentionResult& result_;
  int64_t d_;
  Scratch scratch_;
  float *q_, *k_, *v_, *k_panels_, *scores_, *out_, *inverse_sum_, *log_sum_;
};

class BackwardPiece {
 public:
  BackwardPiece(const AttentionInputs& inputs, const AttentionResult& result,
                const at::Tensor& grad_out, const AttentionGrads& grads, int64_t most)
      : in_(inputs),
        result_(result),
        grad_out_(grad_out),
        grads_(grads),
        d_(inputs.shape.head_dim),
        scratch_(most * (10 * d_ + 2 * kBlock + 2) + 256),
        q_(scratch_.take(most * d_)),
        k_(scratch_.take(most * d_)),
        v_(scratch_.take(most * d_)),
        dout_(scratch_.take(most * d_)),
        q_panels_(scratch_.take(most * d_)),
        k_panels_(scratch_.take(most * d_)),
        dout_panels_(scratch_.take(most * d_)),
        dq_panels_(scratch_.take(most * d_)),
        dk_(scratch_.take(most * d_)),
        dv_(scratch_.take(most * d_)),
        p_(scratch_.take(most * kBlock)),
        ds_(scratch_.take(most * kBlock)),
        log_sum_(scratch_.take(most)),
        dot_(scratch_.take(most)) {}

  void run(const Piece& piece) {
    const Rotation rotation = rotation_at(in_, piece.begin);
    load_padded({in_.k, piece.group, d_}, piece, rotation, 1.0F, k_);
    load_padded({in_.v, piece.group, d_}, piece, {}, 1.0F, v_);
    make_panels(k_, piece.padded, d_, k_panels_);
    const int64_t per_group = in_.shape.num_heads / in_.shape.num_kv_heads;
    for (int64_t h = 0; h < per_group; ++h) run_head(piece, piece.group * per_group + h, h > 0);
    store_rows(dk_, piece.begin, piece.tokens, {grads_.k, piece.group, d_}, rotation, 1.0F);
    store_rows(dv_, piece.begin, piece.tokens, {grads_.v, piece.group, d_}, {}, 1.0F);
  }

 private:
  void run_head(const Piece& piece, int64_t head, bool accumulate) {
    load_query_side(piece, head);
    for (int64_t key = 0; key < piece.tokens; key += kBlock) {
      const int64_t columns = piece.padded - key, stride = piece.padded, at = key * d_;
      multiply_panels(k_ + at, q_panels_ + at, columns, d_, p_, stride);
      multiply_panels(v_ + at, dout_panels_ + at, columns, d_, ds_, stride);
      attention_weights_backward(p_, ds_, stride, kBlock, columns, log_sum_ + key, dot_ + key);
      weigh_rows(p_, stride, dout_ + at, columns, d_, dv_ + at, accumulate);
      weigh_rows(ds_, stride, q_ + at, columns, d_, dk_ + at, accumulate);
      for (int64_t p = 0; p < columns; p += kBlock) {
        small_gemm(d_, kBlock, kBlock, k_panels_ + at, kBlock, ds_ + p, stride,
                   dq_panels_ + at + p * d_, kBlock, key > 0);
      }
    }
    store_query_grad(piece, head);
  }

  /// q, dO, their panels, log_sum and rowsum(dO O). The rows of O pass through the scratch of dQ.
  void load_query_side(const Piece& piece, int64_t head) {
    load_padded({result_.out, head, d_}, piece, {}, 1.0F, dq_panels_);
    load_padded({grad_out_, head, d_}, piece, {}, 1.0F, dout_);
    row_dots(dout_, dq_panels_, piece.padded, d_, dot_);
    load_padded({in_.q, head, d_}, piece, rotation_at(in_, piece.begin), softmax_scale(in_.shape),
                q_);
    make_panels(q_, piece.padded, d_, q_panels_);
    make_panels(dout_, piece.padded, d_, dout_panels_);
    const float* log_sum =
        in<float>(result_.log_sum) + head * result_.log_sum.size(1) + piece.begin;
    std::copy(log_sum, log_sum + piece.tokens, log_sum_);
    std::fill(log_sum_ + piece.tokens, log_sum_ + piece.padded,
              std::numeric_limits<float>::infinity());
  }

  void store_query_grad(const Piece& piece, int64_t head) {
    for (int64_t row = 0; row < piece.tokens; row += kBlock) {
      const int64_t rows = std::min(kBlock, piece.tokens - row), at = piece.begin + row;
      transpose(dq_panels_ + row * d_, d_, kBlock, q_, d_);  // q is not needed any more
      store_rows(q_, at, rows, {grads_.q, head, d_}, rotation_at(in_, at),
                 softmax_scale(in_.shape));
    }
  }

  const AttentionInputs& in_;
  const AttentionResult& result_;
  const at::Tensor& grad_out_;
  const AttentionGrads& grads_;
  int64_t d_;
  Scratch scratch_;
  float *q_, *k_, *v_, *dout_, *q_panels_, *k_panels_, *dout_panels_, *dq_panels_, *dk_, *dv_, *p_,
      *ds_, *log_sum_, *dot_;
};

/// Runs `make()` once in each thread and its run(piece) for that thread's pieces.
template <class Make>
void for_pieces(const std::vector<Piece>& pieces, Make make) {
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t i = begin; i < end; ++i) worker.run(pieces[static_cast<size_t>(i)]);
    small_gemm_done();
  });
}

void store_in_cache(const AttentionInputs& inputs, const at::Tensor& key_cache,
                    const at::Tensor& value_cache, int64_t begin) {
  const int64_t d = inputs.shape.head_dim, tokens = inputs.k.size(0);
  for (int64_t g = 0; g < inputs.shape.num_kv_heads; ++g) {
    const Piece piece{0, tokens, tokens, g};
    float* keys = out<float>(key_cache) + g * key_cache.stride(0);
    float* values = out<float>(value_cache) + g * value_cache.stride(0);
    load_padded({inputs.k, g, d}, piece, rotation_at(inputs, 0), 1.0F, keys + begin * d);
    load_padded({inputs.v, g, d}, piece, {}, 1.0F, values + begin * d);
  }
}

/// [2, count, G d] of caches [G, capacity, d].
at::Tensor first_tokens(const at::Tensor& keys, const at::Tensor& values, int64_t count) {
  return at::stack({keys.narrow(1, 0, count), values.narrow(1, 0, count)})
      .transpose(1, 2)
      .flatten(2);
}

/// Of the one new token.
void attend_cached_group(const AttentionInputs& inputs, const at::Tensor& key_cache,
                         const at::Tensor& value_cache, int64_t begin, int64_t group,
                         const at::Tensor& result) {
  const int64_t d = inputs.shape.head_dim;
  const int64_t per_group = inputs.shape.num_heads / inputs.shape.num_kv_heads;
  Scratch scratch(2 * d + begin + 65);
  float *q = scratch.take(d), *attended = scratch.take(d), *scores = scratch.take(begin + 1);
  const float* keys = in<float>(key_cache) + group * key_cache.stride(0);
  const float* values = in<float>(value_cache) + group * value_cache.stride(0);
  for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h) {
    load_padded({inputs.q, h, d}, {0, 1, 1, group}, rotation_at(inputs, 0),
                softmax_scale(inputs.shape), q);
    attend_one(q, keys, values, begin + 1, d, scores, attended);
    store_rows(attended, 0, 1, {result, h, d}, {}, 1.0F);
  }
}

}  // namespace

AttentionResult attention_cpu_forward(const AttentionInputs& inputs) {
  const AttentionResult result{at::empty_like(inputs.q),
                               at::empty({inputs.shape.num_heads, inputs.q.size(0)}, at::kFloat)};
  const std::vector<Piece> pieces = pieces_of(inputs);
  const int64_t most = longest(pieces);
  for_pieces(pieces, [&] { return ForwardPiece(inputs, result, most); });
  return result;
}

AttentionGrads attention_cpu_backward(const AttentionInputs& inputs, const AttentionResult& result,
                                      const at::Tensor& grad_out) {
  const AttentionGrads grads{at::empty_like(inputs.q), at::empty_like(inputs.k),
                             at::empty_like(inputs.v)};
  const std::vector<Piece> pieces = pieces_of(inputs);
  const int64_t most = longest(pieces);
  for_pieces(pieces, [&] { return BackwardPiece(inputs, result, grad_out, grads, most); });
  return grads;
}

at::Tensor attention_cpu_cached(const AttentionInputs& inputs, const at::Tensor& key_cache,
                                const at::Tensor& value_cache, int64_t begin) {
  store_in_cache(inputs, key_cache, value_cache, begin);
  if (inputs.q.size(0) > 1) {  // a prompt
    AttentionResult attended = attention_cpu_forward(inputs);
    if (begin > 0) join_prefix(inputs, first_tokens(key_cache, value_cache, begin), attended);
    return attended.out;
  }
  const at::Tensor result = at::empty_like(inputs.q);
  at::parallel_for(0, inputs.shape.num_kv_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g)
      attend_cached_group(inputs, key_cache, value_cache, begin, g, result);
  });
  return result;
}

}  // namespace fsdp::models
