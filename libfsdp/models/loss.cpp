#include "libfsdp/models/loss.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/models/cpu_data.h"
#include "libfsdp/models/cpu_loops.h"
#include "libfsdp/shard/gradient_sink.h"

namespace fsdp::models {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kLogitsBytes = int64_t{64} << 20;
constexpr int64_t kMinRows = 64;
constexpr int64_t kFrozenRows = 128;  // a block's on the CPU, where the weight is frozen
constexpr int64_t kVocabularyPart = 6144;

int64_t rows_per_block(int64_t vocabulary) {
  const int64_t fitting = kLogitsBytes / (vocabulary * static_cast<int64_t>(sizeof(float)));
  return std::max(kMinRows, fitting / kMinRows * kMinRows);
}

void check_targets(const Tensor& targets, int64_t vocabulary) {
  if (!targets.device().is_cpu()) return;  // the device's own gather reports it
  const int64_t* ids = in<int64_t>(targets);
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      throw DataError(cat("loss: label ", ids[i], " is outside the vocabulary of ", vocabulary,
                          " tokens. Hint: does the tokenizer belong to this model?"));
    }
  }
}

// Note [Logits in parts] Logits of R rows are tensors [R, up to kVocabularyPart]: products over
// more of the vocabulary fall out of the cache, and one large buffer leaves a hole in the heap that
// it does not fit into again once something small has been kept there.
using Logits = std::vector<Tensor>;

Logits empty_logits(int64_t rows, int64_t vocabulary, const Tensor& hidden) {
  Logits parts;
  const int64_t width = on_fused_cpu(hidden) ? kVocabularyPart : vocabulary;
  for (int64_t at = 0; at < vocabulary; at += width)
    parts.push_back(at::empty({rows, std::min(width, vocabulary - at)}, hidden.options()));
  return parts;
}

Logits first_rows(const Logits& logits, int64_t rows) {
  Logits parts;
  for (const Tensor& part : logits) parts.push_back(part.narrow(0, 0, rows));
  return parts;
}

/// Losses of some rows summed; the logits become their gradient if `gradient`.
Tensor losses_on_cpu(const Logits& logits, const Tensor& targets, int64_t vocabulary,
                     bool gradient) {
  const int64_t rows = targets.numel(), width = logits[0].size(1);
  std::vector<double> losses(static_cast<size_t>(rows));
  for_cpu_type(logits[0], [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<T*> row;
      for (const Tensor& part : logits) row.push_back(out<T>(part) + begin * part.size(1));
      for (int64_t r = begin; r < end; ++r) {
        losses[static_cast<size_t>(r)] =
            token_loss(row.data(), width, vocabulary, in<int64_t>(targets)[r], gradient);
        for (size_t i = 0; i < row.size(); ++i) row[i] += logits[i].size(1);
      }
    });
  });
  return at::scalar_tensor(std::accumulate(losses.begin(), losses.end(), 0.0), at::kDouble);
}

Tensor losses_composed(const Tensor& logits, const Tensor& targets, bool gradient) {
  const Tensor wide = logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
  const Tensor log_sum = at::logsumexp(wide, {1}), places = targets.unsqueeze(1);
  const Tensor loss = (log_sum - wide.gather(1, places).squeeze(1)).sum(at::kDouble);
  if (gradient) {
    Tensor p = (wide - log_sum.unsqueeze(1)).exp_();
    p.scatter_add_(1, places, at::scalar_tensor(-1.0, p.options()).expand_as(places));
    logits.copy_(p);
  }
  return loss;
}

struct LossAndGrads {
  Tensor loss;      // double, []
  Tensor d_rows;    // [M, D]
  Tensor d_weight;  // [V, D]
};

/// Some rows h [R, D] and the vocabulary's weight [V, D].
class Head {
 public:
  Head(const Tensor& h, const Tensor& weight) : h_(h), weight_(weight) {}

  /// Losses summed; logits become their gradient if `gradient`.
  Tensor losses(const Logits& logits, const Tensor& targets, bool gradient) const {
    walk(logits,
         [&](int64_t, Tensor part, const Tensor& weight) { at::mm_out(part, h_, weight.t()); });
    return on_fused_cpu(h_) ? losses_on_cpu(logits, targets, weight_.size(0), gradient)
                            : losses_composed(logits[0], targets, gradient);
  }
  /// d_weight is replaced if `fresh`, else added to.
  void add_gradients(const Logits& d_logits, Tensor d_rows, Tensor d_weight, bool fresh) const {
    walk(d_logits, [&](int64_t at, const Tensor& part, const Tensor& weight) {
      if (d_rows.defined()) accumulate(d_rows, part, weight, at == 0);
      if (d_weight.defined()) accumulate(d_weight.narrow(0, at, part.size(1)), part.t(), h_, fresh);
    });
  }

 private:
  template <class F>
  void walk(const Logits& logits, F&& body) const {
    int64_t at = 0;
    for (const Tensor& part : logits) {
      body(at, part, weight_.narrow(0, at, part.size(1)));
      at += part.size(1);
    }
  }
  static void accumulate(Tensor to, const Tensor& a, const Tensor& b, bool fresh) {
    if (fresh) {
      at::mm_out(to, a, b);
    } else {
      at::addmm_out(to, to, a, b);
    }
  }

  const Tensor &h_, &weight_;
};

LossAndGrads run_blocks(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                        bool need_hidden, bool need_weight) {
  const bool gradient = need_hidden || need_weight,
             few = gradient && !need_weight && hidden.device().is_cpu();
  const int64_t count = hidden.size(0), most = rows_per_block(weight.size(0)),
                block_rows = std::min(count, few ? std::min(most, kFrozenRows) : most);
  LossAndGrads result{at::scalar_tensor(0.0, hidden.options().dtype(at::kDouble)), {}, {}};
  if (need_hidden) result.d_rows = at::empty_like(hidden);
  if (need_weight) result.d_weight = count > 0 ? at::empty_like(weight) : at::zeros_like(weight);
  const Logits buffer = empty_logits(block_rows, weight.size(0), hidden);
  for (int64_t row = 0; row < count; row += block_rows) {
    const int64_t n = std::min(block_rows, count - row);
    const Tensor h = hidden.narrow(0, row, n), labels = targets.narrow(0, row, n);
    const Head head(h, weight);
    const Logits logits = first_rows(buffer, n);
    result.loss += head.losses(logits, labels, gradient);
    if (gradient)
      head.add_gradients(logits, need_hidden ? result.d_rows.narrow(0, row, n) : Tensor(),
                         result.d_weight, row == 0);
  }
  return result;
}

c10::IValue take(AutogradContext* ctx, const char* name) {
  const auto found = ctx->saved_data.find(name);
  check(found != ctx->saved_data.end(), "a loss can go backward only once");
  c10::IValue result = std::move(found->second);
  ctx->saved_data.erase(found);
  return result;
}

/// All rows in one block, for a weight that is trained: backward makes the products, so that
/// nothing of the weight's size is kept and its gradient goes where it is wanted.
class SmallCrossEntropy : public torch::autograd::Function<SmallCrossEntropy> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                        const Tensor& rows, const Tensor& targets) {
    const Tensor h = hidden.index_select(0, rows);
    const Logits logits = empty_logits(h.size(0), weight.size(0), h);
    const Tensor loss = Head(h, weight).losses(logits, targets, true);
    ctx->save_for_backward({h, weight, rows});
    // Not saved variables: backward frees them when it is done.
    ctx->saved_data["d_logits"] = logits;
    ctx->saved_data["tokens"] = hidden.size(0);
    return loss.to(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &rows = saved[2];
    const Logits d_logits = take(ctx, "d_logits").toTensorVector();
    const bool unit = grads[0].device().is_cpu() && grads[0].item<double>() == 1.0;
    if (!unit) {
      for (const Tensor& part : d_logits) part.mul_(grads[0].to(part.scalar_type()));
    }
    Tensor d_rows = ctx->needs_input_grad(0) ? at::empty_like(h) : Tensor();
    Tensor d_weight;
    bool fresh = true;
    std::optional<GradientPlace> place;
    if (ctx->needs_input_grad(1)) {
      place = gradient_place(weight, h.scalar_type());
      d_weight = place ? place->tensor : at::empty_like(weight);
      fresh = !place || !place->accumulate;
    }
    Head(h, weight).add_gradients(d_logits, d_rows, d_weight, fresh);
    Tensor d_hidden;
    if (d_rows.defined()) {
      d_hidden = at::zeros({ctx->saved_data["tokens"].toInt(), d_rows.size(1)}, d_rows.options());
      d_hidden.index_copy_(0, rows, d_rows);
    }
    return {d_hidden, place ? Tensor() : d_weight, Tensor(), Tensor()};
  }
};

/// The gradient, or nothing when it has been copied to where it is wanted: a tied weight's would be
/// kept to the end of backward.
Tensor hand_over(const Tensor& weight, const Tensor& gradient) {
  const auto place = gradient_place(weight, gradient.scalar_type());
  if (!place) return gradient;
  Tensor to = place->tensor;
  place->accumulate ? to.add_(gradient) : to.copy_(gradient);
  return {};
}

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                        const Tensor& rows, const Tensor& targets, bool with_gradients) {
    const bool need_hidden = with_gradients && hidden.requires_grad(),
               need_weight = with_gradients && weight.requires_grad();
    LossAndGrads result =
        run_blocks(hidden.index_select(0, rows), weight, targets, need_hidden, need_weight);
    ctx->save_for_backward({rows, weight});
    // Not as saved variables: backward gives these tensors away, so that autograd can keep or add
    // to them in place.
    ctx->saved_data["d_rows"] = result.d_rows;
    ctx->saved_data["d_weight"] = result.d_weight;
    ctx->saved_data["tokens"] = hidden.size(0);
    return result.loss.to(hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor rows = ctx->get_saved_variables()[0];
    const Tensor d_rows = take(ctx, "d_rows").toTensor();
    Tensor d_weight = take(ctx, "d_weight").toTensor();
    // The usual case, the gradient of the loss itself, costs no pass over d(weight).
    const bool unit = grads[0].device().is_cpu() && grads[0].item<double>() == 1.0;
    const auto scaled = [&](const Tensor& t) {
      return unit || !t.defined() ? t : t * grads[0].to(t.scalar_type());
    };
    Tensor d_hidden;
    if (d_rows.defined()) {
      d_hidden = at::zeros({ctx->saved_data["tokens"].toInt(), d_rows.size(1)}, d_rows.options());
      d_hidden.index_copy_(0, rows, scaled(d_rows));
    }
    if (d_weight.defined()) d_weight = hand_over(ctx->get_saved_variables()[1], scaled(d_weight));
    return {d_hidden, d_weight, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& rows,
                            const Tensor& targets) {
  check_targets(targets, weight.size(0));
  const bool gradient =
      at::GradMode::is_enabled() && (hidden.requires_grad() || weight.requires_grad());
  // For a frozen weight the logits' gradient need not outlive the forward, but in fp16 products of
  // what backward has scaled keep gradients that would be zero.
  const bool outlives = weight.requires_grad() || hidden.scalar_type() == at::kHalf;
  if (gradient && outlives && rows.numel() > 0 && rows.numel() <= rows_per_block(weight.size(0)))
    return SmallCrossEntropy::apply(hidden, weight, rows, targets);
  return LinearCrossEntropy::apply(hidden, weight, rows, targets, at::GradMode::is_enabled());
}

Tensor cross_entropy_sum(const Tensor& logits, const Tensor& targets) {
  check_targets(targets, logits.size(1));
  const at::ScalarType wide = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor losses = at::cross_entropy_loss(logits.to(wide), targets, {}, at::Reduction::None);
  return losses.sum(at::kDouble).to(wide);
}

}  // namespace fsdp::models
