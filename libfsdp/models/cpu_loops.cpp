#include "libfsdp/models/cpu_loops.h"

#include <cmath>
#include <limits>

#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/models/cpu_vector.h"

namespace fsdp::models {
namespace {

// Each loop is written once as a template that is inlined into one function per type, and that
// function is compiled once per instruction set: attributes for the latter do not reach templates.

/// Sum over i < n of term(i) with four running sums; term(i, count) for the rest.
template <class Full, class Part>
FSDP_INLINE float lane_sum(int64_t n, Full full, Part part) {
  V16 a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a += full(i);
    b += full(i + kLanes);
    c += full(i + 2 * kLanes);
    d += full(i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) a += full(i);
  if (i < n) b += part(i, n - i);
  return sum_lanes((a + b) + (c + d));
}

template <class T>
FSDP_INLINE void rms_norm_body(const T* x, const T* weight, T* y, float* rstd, int64_t rows,
                               int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    const float squares = lane_sum(
        width,
        [&](int64_t i) FSDP_INLINED {
          const V16 v = load(x + i);
          return v * v;
        },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          const V16 v = load_some(x + i, n);
          return v * v;
        });
    const float scale = 1.0F / std::sqrt(squares / static_cast<float>(width) + eps);
    rstd[row] = scale;
    for_lanes(
        width,
        [&](int64_t i) FSDP_INLINED { store(y + i, load(x + i) * scale * load(weight + i)); },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          store_some(y + i, load_some(x + i, n) * scale * load_some(weight + i, n), n);
        });
  }
}

template <class T>
FSDP_INLINE void rms_norm_backward_body(const T* x, const T* weight, const float* rstd, const T* dy,
                                        T* dx, float* weight_grad, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    const float scale = rstd[row];
    const float dot = lane_sum(
        width,
        [&](int64_t i) FSDP_INLINED { return load(dy + i) * load(weight + i) * load(x + i); },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          return load_some(dy + i, n) * load_some(weight + i, n) * load_some(x + i, n);
        });
    const float pull = dot * scale * scale / static_cast<float>(width);
    for_lanes(
        width,
        [&](int64_t i) FSDP_INLINED {
          const V16 g = load(dy + i), v = load(x + i);
          store(weight_grad + i, load(weight_grad + i) + g * v * scale);
          store(dx + i, (g * load(weight + i) - v * pull) * scale);
        },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          const V16 g = load_some(dy + i, n), v = load_some(x + i, n);
          store_some(weight_grad + i, load_some(weight_grad + i, n) + g * v * scale, n);
          store_some(dx + i, (g * load_some(weight + i, n) - v * pull) * scale, n);
        });
  }
}

FSDP_INLINE V16 sigmoid(V16 x) { return 1.0F / (1.0F + exp(-x)); }

template <class T>
FSDP_INLINE void swiglu_body(const T* gate, const T* up, T* y, int64_t n) {
  for_lanes(
      n,
      [&](int64_t i) FSDP_INLINED {
        const V16 g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
      },
      [&](int64_t i, int64_t count) FSDP_INLINED {
        const V16 g = load_some(gate + i, count);
        store_some(y + i, g * sigmoid(g) * load_some(up + i, count), count);
      });
}

struct SwigluGrad {
  V16 gate, up;
};
FSDP_INLINE SwigluGrad swiglu_grad(V16 g, V16 u, V16 dy) {
  const V16 s = sigmoid(g);
  const V16 silu = g * s;
  return {dy * u * (s + silu * (1.0F - s)), dy * silu};
}

template <class T>
FSDP_INLINE void swiglu_backward_body(const T* gate, const T* up, const T* dy, T* dgate, T* dup,
                                      int64_t n) {
  for_lanes(
      n,
      [&](int64_t i) FSDP_INLINED {
        const SwigluGrad d = swiglu_grad(load(gate + i), load(up + i), load(dy + i));
        store(dgate + i, d.gate);
        store(dup + i, d.up);
      },
      [&](int64_t i, int64_t count) FSDP_INLINED {
        const SwigluGrad d = swiglu_grad(load_some(gate + i, count), load_some(up + i, count),
                                         load_some(dy + i, count));
        store_some(dgate + i, d.gate, count);
        store_some(dup + i, d.up, count);
      });
}

/// Moves one row, rotating the pairs (i, i + width / 2) by the angle; `sign` -1 rotates back.
template <class From, class To>
FSDP_INLINE void move_row(const From* from, To* to, int64_t width, const float* cos,
                          const float* sin, float scale, float sign) {
  if (cos == nullptr) {
    for_lanes(
        width, [&](int64_t i) FSDP_INLINED { store(to + i, load(from + i) * scale); },
        [&](int64_t i, int64_t n)
            FSDP_INLINED { store_some(to + i, load_some(from + i, n) * scale, n); });
    return;
  }
  const int64_t half = width / 2;
  for_lanes(
      half,
      [&](int64_t i) FSDP_INLINED {
        const V16 a = load(from + i), b = load(from + half + i);
        const V16 c = load(cos + i) * scale, s = load(sin + i) * (scale * sign);
        store(to + i, a * c - b * s);
        store(to + half + i, b * c + a * s);
      },
      [&](int64_t i, int64_t n) FSDP_INLINED {
        const V16 a = load_some(from + i, n), b = load_some(from + half + i, n);
        const V16 c = load_some(cos + i, n) * scale, s = load_some(sin + i, n) * (scale * sign);
        store_some(to + i, a * c - b * s, n);
        store_some(to + half + i, b * c + a * s, n);
      });
}

template <class From, class To>
FSDP_INLINE void move_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                           int64_t rows, int64_t width, Rotation rotation, float scale,
                           float sign) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * (width / 2);
    const float* cos = rotation.cos ? rotation.cos + at : nullptr;
    move_row(from + row * from_stride, to + row * to_stride, width, cos, rotation.sin + at, scale,
             sign);
  }
}

template <class T>
FSDP_INLINE void store_scaled_body(const float* from, const float* scale, int64_t rows,
                                   int64_t width, T* to, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    move_row(from + row * width, to + row * stride, width, static_cast<const float*>(nullptr),
             nullptr, scale[row], 1.0F);
  }
}

template <class T>
FSDP_INLINE float row_max(const T* row, int64_t n) {
  V16 most = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max(most, load(row + i));
  float result = max_lanes(most);
  for (; i < n; ++i) {
    const float v = load_some(row + i, 1)[0];
    result = v > result ? v : result;
  }
  return result;
}

/// row = exp(row - shift) if `keep`; returns the sum.
template <bool kKeep, class T>
FSDP_INLINE float exp_row(T* row, int64_t n, float shift) {
  return lane_sum(
      n,
      [&](int64_t i) FSDP_INLINED {
        const V16 e = exp(load(row + i) - shift);
        if (kKeep) store(row + i, e);
        return e;
      },
      [&](int64_t i, int64_t count) FSDP_INLINED {
        V16 e = exp(load_some(row + i, count) - shift);
        if (kKeep) store_some(row + i, e, count);
        for (int64_t lane = count; lane < kLanes; ++lane) e[lane] = 0;
        return e;
      });
}

FSDP_INLINE void softmax_rows_body(float* scores, int64_t stride, int64_t rows, int64_t width,
                                   int64_t valid, float* inverse_sum, float* log_sum) {
  for (int64_t row = 0; row < rows; ++row, scores += stride) {
    const int64_t n = valid + row < width ? valid + row : width;
    const float most = row_max(scores, n);
    const float sum = exp_row<true>(scores, n, most);
    for (int64_t i = n; i < width; ++i) scores[i] = 0;
    inverse_sum[row] = 1.0F / sum;
    log_sum[row] = most + std::log(sum);
  }
}

FSDP_INLINE void weights_backward_body(float* scores, float* dp, int64_t stride, int64_t rows,
                                       int64_t columns, const float* log_sum, const float* dot) {
  for (int64_t row = 0; row < rows; ++row, scores += stride, dp += stride) {
    for (int64_t i = 0; i < row && i < columns; ++i)
      scores[i] = -std::numeric_limits<float>::infinity();
    for_lanes(
        columns,
        [&](int64_t i) FSDP_INLINED {
          const V16 p = exp(load(scores + i) - load(log_sum + i));
          store(scores + i, p);
          store(dp + i, p * (load(dp + i) - load(dot + i)));
        },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          const V16 p = exp(load_some(scores + i, n) - load_some(log_sum + i, n));
          store_some(scores + i, p, n);
          store_some(dp + i, p * (load_some(dp + i, n) - load_some(dot + i, n)), n);
        });
  }
}

template <class T>
FSDP_INLINE void softmax_body(T* logits, int64_t n, float most, float scale) {
  for_lanes(
      n, [&](int64_t i) FSDP_INLINED { store(logits + i, exp(load(logits + i) - most) * scale); },
      [&](int64_t i, int64_t count) FSDP_INLINED {
        store_some(logits + i, exp(load_some(logits + i, count) - most) * scale, count);
      });
}

/// The exponentials are computed again for the gradient: cheaper than a pass over memory, and exact
/// for bfloat16.
template <class T>
FSDP_INLINE double token_loss_body(T* const* parts, int64_t width, int64_t n, int64_t target,
                                   bool gradient) {
  const auto numel = [&](int64_t at) { return width < n - at ? width : n - at; };
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t at = 0, i = 0; at < n; at += width, ++i) {
    const float of_part = row_max(parts[i], numel(at));
    most = of_part > most ? of_part : most;
  }
  double sum = 0;
  for (int64_t at = 0, i = 0; at < n; at += width, ++i)
    sum += static_cast<double>(exp_row<false>(parts[i], numel(at), most));
  T* const place = parts[target / width] + target % width;
  const float of_target = load_some(place, 1)[0];
  if (gradient) {
    const float scale = 1.0F / static_cast<float>(sum);
    for (int64_t at = 0, i = 0; at < n; at += width, ++i)
      softmax_body(parts[i], numel(at), most, scale);
    const float p = std::exp(of_target - most) * scale;
    store_some(place, splat(p - 1.0F), 1);
  }
  return std::log(sum) + static_cast<double>(most) - static_cast<double>(of_target);
}

}  // namespace

#define FSDP_FOR_TYPE(T)                                                                           \
  template <>                                                                                      \
  FSDP_CPU_CLONES void rms_norm_rows(const T* x, const T* weight, T* y, float* rstd, int64_t rows, \
                                     int64_t width, float eps) {                                   \
    rms_norm_body(x, weight, y, rstd, rows, width, eps);                                           \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void rms_norm_rows_backward(const T* x, const T* weight, const float* rstd,      \
                                              const T* dy, T* dx, float* weight_grad,              \
                                              int64_t rows, int64_t width) {                       \
    rms_norm_backward_body(x, weight, rstd, dy, dx, weight_grad, rows, width);                     \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void swiglu(const T* gate, const T* up, T* y, int64_t n) {                       \
    swiglu_body(gate, up, y, n);                                                                   \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void swiglu_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup,  \
                                       int64_t n) {                                                \
    swiglu_backward_body(gate, up, dy, dgate, dup, n);                                             \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void load_head(const T* from, int64_t stride, int64_t rows, int64_t width,       \
                                 Rotation rotation, float scale, float* to) {                      \
    move_rows(from, stride, to, width, rows, width, rotation, scale, 1.0F);                        \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void store_head(const float* from, int64_t rows, int64_t width,                  \
                                  Rotation rotation, float scale, T* to, int64_t stride) {         \
    move_rows(from, width, to, stride, rows, width, rotation, scale, -1.0F);                       \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES void store_scaled_rows(const float* from, const float* scale, int64_t rows,      \
                                         int64_t width, T* to, int64_t stride) {                   \
    store_scaled_body(from, scale, rows, width, to, stride);                                       \
  }                                                                                                \
  template <>                                                                                      \
  FSDP_CPU_CLONES double token_loss(T* const* parts, int64_t width, int64_t n, int64_t target,     \
                                    bool gradient) {                                               \
    return token_loss_body(parts, width, n, target, gradient);                                     \
  }
FSDP_FOR_TYPE(float)
FSDP_FOR_TYPE(uint16_t)
#undef FSDP_FOR_TYPE

FSDP_CPU_CLONES void row_dots(const float* a, const float* b, int64_t rows, int64_t width,
                              float* out) {
  for (int64_t row = 0; row < rows; ++row, a += width, b += width) {
    out[row] = lane_sum(
        width, [&](int64_t i) FSDP_INLINED { return load(a + i) * load(b + i); },
        [&](int64_t i, int64_t n)
            FSDP_INLINED { return load_some(a + i, n) * load_some(b + i, n); });
  }
}

FSDP_CPU_CLONES void transpose(const float* from, int64_t rows, int64_t columns, float* to,
                               int64_t to_stride) {
  constexpr int64_t kTile = 16;  // one cache line wide
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    const int64_t r1 = r0 + kTile < rows ? r0 + kTile : rows;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = r0; r < r1; ++r) to[c * to_stride + r] = from[r * columns + c];
    }
  }
}

FSDP_CPU_CLONES void softmax_rows(float* scores, int64_t stride, int64_t rows, int64_t width,
                                  int64_t valid, float* inverse_sum, float* log_sum) {
  softmax_rows_body(scores, stride, rows, width, valid, inverse_sum, log_sum);
}

FSDP_CPU_CLONES void attention_weights_backward(float* scores, float* dp, int64_t stride,
                                                int64_t rows, int64_t columns, const float* log_sum,
                                                const float* dot) {
  weights_backward_body(scores, dp, stride, rows, columns, log_sum, dot);
}

FSDP_CPU_CLONES void attend_one(const float* query, const float* keys, const float* values,
                                int64_t count, int64_t width, float* scores, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const float* key = keys + j * width;
    scores[j] = lane_sum(
        width, [&](int64_t i) FSDP_INLINED { return load(query + i) * load(key + i); },
        [&](int64_t i, int64_t n)
            FSDP_INLINED { return load_some(query + i, n) * load_some(key + i, n); });
  }
  const float scale = 1.0F / exp_row<true>(scores, count, row_max(scores, count));
  for (int64_t i = 0; i < width; ++i) out[i] = 0;
  for (int64_t j = 0; j < count; ++j) {
    const float p = scores[j] * scale;
    const float* value = values + j * width;
    for_lanes(
        width, [&](int64_t i) FSDP_INLINED { store(out + i, load(out + i) + load(value + i) * p); },
        [&](int64_t i, int64_t n) FSDP_INLINED {
          store_some(out + i, load_some(out + i, n) + load_some(value + i, n) * p, n);
        });
  }
}

}  // namespace fsdp::models
