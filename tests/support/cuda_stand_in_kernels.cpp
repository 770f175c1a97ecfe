// The stand-in's kernels: the CPU twins, on its streams.
#include <algorithm>
#include <vector>

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/compute.h"
#include "libfsdp/kernels/cuda_kernel_table.h"
#include "libfsdp/kernels/fold.h"
#include "libfsdp/kernels/quantized_weight.h"
#include "libfsdp/kernels/split_master.h"
#include "libfsdp/kernels/update.h"
#include "tests/support/cuda_stand_in.h"

namespace fsdp::stand_in {
namespace {

DType dtype_of(kernels::FoldType type) {
  if (type == kernels::FoldType::kF32) return DType::kF32;
  return type == kernels::FoldType::kBf16 ? DType::kBF16 : DType::kF16;
}

int fold_ranks(float* destination, const void* const* sources, int count, kernels::FoldType type,
               int64_t n, int accumulate, void* stream) {
  const std::vector<const void*> list(sources, sources + count);
  return enqueue(
      stream, [=] { kernels::fold_ranks(destination, list, dtype_of(type), n, accumulate != 0); });
}

int add_gradient_sums(const float* values, int64_t n, kernels::NormType type, int64_t* limbs,
                      float* max_abs, int64_t* non_finite, void* stream) {
  return enqueue(stream, [=] {
    kernels::GradientSums sums;
    kernels::add_gradient_sums(values, n, type, sums);
    const kernels::ExactSum::Limbs more = sums.sum.limbs();
    for (size_t i = 0; i < more.size(); ++i) limbs[i] += more[i];
    *max_abs = std::max(*max_abs, sums.max_abs);
    *non_finite += sums.non_finite;
  });
}

const kernels::CudaKernelTable kKernels = {
    kernels::kCudaKernelTableVersion,
    [](const float* master, uint16_t* high, uint16_t* remainder, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::split_master_cpu(master, high, remainder, n); });
    },
    [](const uint16_t* high, const uint16_t* remainder, float* master, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::join_master_cpu(high, remainder, master, n); });
    },
    fold_ranks,
    [](const float* from, void* to, kernels::FoldType type, int64_t n, void* stream) {
      return enqueue(stream, [=] { kernels::host_compute().convert(from, to, dtype_of(type), n); });
    },
    [](float* values, int64_t n, float factor, float limit, void* stream) {
      return enqueue(stream, [=] { kernels::host_compute().scale(values, n, factor, limit); });
    },
    [](const float* values, int64_t n, kernels::NormType type, double* sums, int64_t* non_finite,
       void* stream) {
      return enqueue(stream, [=] { *non_finite += kernels::quantum_sums(values, n, type, sums); });
    },
    add_gradient_sums,
    [](const kernels::ParameterArrays* parameter, const float* gradient, float* exp_avg,
       float* exp_avg_sq, int64_t n, const kernels::AdamWScalars* scalars, void* stream) {
      return enqueue(stream, [=, p = *parameter, s = *scalars] {
        kernels::adamw(p, gradient, exp_avg, exp_avg_sq, n, s);
      });
    },
    [](const kernels::ParameterArrays* parameter, const float* gradient, float* buffer, int64_t n,
       int nesterov, const kernels::SgdScalars* scalars, void* stream) {
      return enqueue(stream, [=, p = *parameter, s = *scalars] {
        kernels::sgd(p, gradient, buffer, n, nesterov != 0, s);
      });
    },
    [](const kernels::AnyPrecisionArrays* arrays, int64_t n,
       const kernels::AnyPrecisionScalars* scalars, void* stream) {
      return enqueue(stream,
                     [=, a = *arrays, s = *scalars] { kernels::any_precision_adamw(a, n, s); });
    },
    [](const kernels::ParameterArrays* parameter, const float* gradient,
       const kernels::QuantizedState* state, int64_t n, const kernels::AdamWScalars* scalars,
       void* stream) {
      return enqueue(stream, [=, p = *parameter, q = *state, s = *scalars] {
        kernels::adamw_8bit(p, gradient, q, n, s);
      });
    },
    [](const void* values, kernels::FoldType type, int64_t numel, kernels::FourBitCode code,
       int64_t blocksize, uint8_t* packed, float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::quantize_4bit(values, dtype_of(type), numel, code, blocksize, packed, absmax);
      });
    },
    [](const uint8_t* packed, const float* absmax, int64_t numel, kernels::FourBitCode code,
       int64_t blocksize, void* values, kernels::FoldType type, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_4bit(packed, absmax, numel, code, blocksize, values, dtype_of(type));
      });
    },
    [](const uint8_t* codes, const float* nested_absmax, float offset, int64_t skip, int64_t n,
       float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_absmax(codes, nested_absmax, offset, skip, n, absmax);
      });
    },
    [](const void* values, kernels::FoldType type, int64_t rows, int64_t columns, int8_t* codes,
       float* absmax, void* stream) {
      return enqueue(stream, [=] {
        kernels::quantize_int8(values, dtype_of(type), rows, columns, codes, absmax);
      });
    },
    [](const int8_t* codes, const float* absmax, int64_t columns, int64_t skip, int64_t numel,
       void* values, kernels::FoldType type, void* stream) {
      return enqueue(stream, [=] {
        kernels::dequantize_int8(codes, absmax, columns, skip, numel, values, dtype_of(type));
      });
    },
};

}  // namespace
}  // namespace fsdp::stand_in

extern "C" __attribute__((visibility("default"))) const fsdp::kernels::CudaKernelTable*
fsdp_cuda_kernel_table() {
  return &fsdp::stand_in::kKernels;
}
