// Scalars and states that the tests of updates share, on CPU and GPU.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/split_master.h"
#include "libfsdp/kernels/update.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {

constexpr AdamWScalars kAdamW{.grad_scale = 0.37F,
                              .clip_value = 1.5F,
                              .decay = 0.9999F,
                              .one_minus_beta1 = 0.1F,
                              .beta2 = 0.999F,
                              .one_minus_beta2 = 0.001F,
                              .step_size = 0.0123F,
                              .bias_correction2_sqrt = 0.0547F,
                              .epsilon = 1e-8F};
constexpr SgdScalars kSgd{.grad_scale = 0.37F,
                          .clip_value = 1.5F,
                          .weight_decay = 0.01F,
                          .learning_rate = 0.1F,
                          .momentum = 0.9F};
constexpr AnyPrecisionScalars kAnyPrecision{.grad_scale = 0.37F,
                                            .clip_value = 1.5F,
                                            .decay = 0.99F,
                                            .beta1 = 0.9F,
                                            .one_minus_beta1 = 0.1F,
                                            .beta2 = 0.999F,
                                            .one_minus_beta2 = 0.001F,
                                            .step_size = 0.0123F,
                                            .bias_correction2_sqrt = 0.0547F,
                                            .epsilon = 1e-8F};

constexpr ParameterForm kForms[] = {ParameterForm::kF32,       ParameterForm::kF32AndBf16,
                                    ParameterForm::kF32AndF16, ParameterForm::kSplit,
                                    ParameterForm::kBf16,      ParameterForm::kBf16Stochastic};

/// A parameter, held in every form, with its gradient and fp32 moments; the second is positive.
struct UpdateState {
  std::vector<float> master;
  std::vector<float> gradient;
  std::vector<float> first;
  std::vector<float> second;
  std::vector<uint16_t> high;
  std::vector<uint16_t> remainder;
  std::vector<uint16_t> copy;

  explicit UpdateState(int64_t n)
      : master(random_floats(n, 1)),
        gradient(random_floats(n, 2)),
        first(random_floats(n, 3)),
        second(random_floats(n, 4)),
        high(master.size()),
        remainder(master.size()),
        copy(master.size()) {
    for (float& value : second) value = std::fabs(value);
    split_master_cpu(master.data(), high.data(), remainder.data(), n);
  }

  ParameterArrays arrays(ParameterForm form, int64_t at = 0) {
    ParameterArrays arrays{.form = form, .key = rounding_key(7, 3, 11), .first = at};
    if (form == ParameterForm::kF32 || form == ParameterForm::kF32AndBf16 ||
        form == ParameterForm::kF32AndF16) {
      arrays.master = master.data() + at;
      arrays.copy = form == ParameterForm::kF32 ? nullptr : copy.data() + at;
    } else {
      arrays.high = high.data() + at;
      arrays.remainder = form == ParameterForm::kSplit ? remainder.data() + at : nullptr;
    }
    return arrays;
  }
};

struct AnyPrecisionCase {
  std::string name;
  AnyType parameter;
  AnyType exp_avg;
  AnyType exp_avg_sq;
  bool kahan = false;
  AnyType compensation = AnyType::kBf16;
  bool stochastic = false;
};

/// Every combination that a kernel exists for.
inline std::vector<AnyPrecisionCase> any_precision_cases() {
  std::vector<AnyPrecisionCase> cases;
  const auto letter = [](AnyType type) { return type == AnyType::kF32 ? 'f' : 'b'; };
  for (const AnyType m : {AnyType::kF32, AnyType::kBf16}) {
    for (const AnyType v : {AnyType::kF32, AnyType::kBf16}) {
      const std::string moments = {'m', letter(m), 'v', letter(v)};
      cases.push_back({.name = moments + "Random",
                       .parameter = AnyType::kBf16,
                       .exp_avg = m,
                       .exp_avg_sq = v,
                       .stochastic = true});
      for (const AnyType p : {AnyType::kF32, AnyType::kBf16}) {
        const std::string name = std::string{'p', letter(p)} + moments;
        cases.push_back({name + "Plain", p, m, v});
        cases.push_back({name + "KahanF", p, m, v, true, AnyType::kF32});
        cases.push_back({name + "KahanB", p, m, v, true, AnyType::kBf16});
      }
    }
  }
  return cases;
}

/// Parameter, moments and compensation, stored in a case's types.
struct AnyPrecisionState {
  std::vector<float> gradient;
  std::vector<std::vector<std::byte>> arrays;

  AnyPrecisionState(const AnyPrecisionCase& c, int64_t n) : gradient(random_floats(n, 2)) {
    const UpdateState values(n);
    store(values.master, c.parameter);
    store(values.first, c.exp_avg);
    store(values.second, c.exp_avg_sq);
    if (c.kahan) store(std::vector<float>(values.master.size()), c.compensation);
  }

  AnyPrecisionArrays pointers(const AnyPrecisionCase& c) {
    return {.parameter_type = c.parameter,
            .parameter = arrays[0].data(),
            .gradient = gradient.data(),
            .exp_avg_type = c.exp_avg,
            .exp_avg = arrays[1].data(),
            .exp_avg_sq_type = c.exp_avg_sq,
            .exp_avg_sq = arrays[2].data(),
            .compensation_type = c.compensation,
            .compensation = c.kahan ? arrays[3].data() : nullptr,
            .stochastic = c.stochastic,
            .key = rounding_key(7, 3, 11),
            .first = 0};
  }

 private:
  void store(const std::vector<float>& values, AnyType type) {
    const DType dtype = type == AnyType::kF32 ? DType::kF32 : DType::kBF16;
    arrays.emplace_back(values.size() * dtype_bytes(dtype));
    convert_floats(values.data(), DType::kF32, arrays.back().data(), dtype, values.size());
  }
};

/// 8-bit state, zero at first.
struct QuantizedArrays {
  std::vector<uint8_t> code1;
  std::vector<uint8_t> code2;
  std::vector<float> absmax1;
  std::vector<float> absmax2;

  explicit QuantizedArrays(int64_t n)
      : code1(static_cast<size_t>(n)),
        code2(code1.size()),
        absmax1((code1.size() + kStateBlock - 1) / kStateBlock),
        absmax2(absmax1.size()) {}
  /// From element `at` on, which begins a block.
  QuantizedState pointers(int64_t at = 0) {
    return {code1.data() + at, absmax1.data() + at / kStateBlock, code2.data() + at,
            absmax2.data() + at / kStateBlock};
  }
};

}  // namespace fsdp::kernels
