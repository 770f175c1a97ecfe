#include "libfsdp/kernels/fold.h"

#include <algorithm>
#include <cstring>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/cpu_clones.h"
#include "libfsdp/kernels/element_math.h"

namespace fsdp::kernels {
namespace {

constexpr int64_t kBlockNumel =
    2048;  // 8 KiB of sums: they stay in the first-level cache beside one source block

template <class Source>
FSDP_HD void assign_loop(float* __restrict destination, const void* source, int64_t n) {
  const auto* __restrict from = static_cast<const typename Source::Storage*>(source);
  for (int64_t i = 0; i < n; ++i) destination[i] = Source::widen(from[i]);
}

template <class Source>
FSDP_HD void add_loop(float* __restrict destination, const void* source, int64_t n) {
  const auto* __restrict from = static_cast<const typename Source::Storage*>(source);
  for (int64_t i = 0; i < n; ++i) destination[i] = destination[i] + Source::widen(from[i]);
}

FSDP_CPU_CLONES void assign_f32(float* destination, const void* source, int64_t n) {
  assign_loop<F32Source>(destination, source, n);
}
FSDP_CPU_CLONES void assign_bf16(float* destination, const void* source, int64_t n) {
  assign_loop<Bf16Source>(destination, source, n);
}
FSDP_CPU_CLONES void assign_f16(float* destination, const void* source, int64_t n) {
  assign_loop<F16Source>(destination, source, n);
}
FSDP_CPU_CLONES void add_f32(float* destination, const void* source, int64_t n) {
  add_loop<F32Source>(destination, source, n);
}
FSDP_CPU_CLONES void add_bf16(float* destination, const void* source, int64_t n) {
  add_loop<Bf16Source>(destination, source, n);
}
FSDP_CPU_CLONES void add_f16(float* destination, const void* source, int64_t n) {
  add_loop<F16Source>(destination, source, n);
}

struct FoldLoops {
  void (*assign)(float*, const void*, int64_t);
  void (*add)(float*, const void*, int64_t);
};

FoldLoops loops_for(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {assign_f32, add_f32};
    case DType::kBF16:
      return {assign_bf16, add_bf16};
    case DType::kF16:
      return {assign_f16, add_f16};
    default:
      throw InternalError(
          cat("fold: no sum over ", dtype_name(dtype), "; expected float32, bfloat16 or float16"));
  }
}

}  // namespace

void fold_assign(float* destination, const void* source, DType dtype, int64_t n) {
  loops_for(dtype).assign(destination, source, n);
}

void fold_add(float* destination, const void* source, DType dtype, int64_t n) {
  loops_for(dtype).add(destination, source, n);
}

void fold_ranks(float* destination, std::span<const void* const> sources, DType dtype, int64_t n,
                bool accumulate) {
  const FoldLoops loops = loops_for(dtype);
  const auto element_bytes = static_cast<int64_t>(dtype_bytes(dtype));
  if (sources.empty() && !accumulate)
    std::memset(destination, 0, static_cast<size_t>(n) * sizeof(float));
  for (int64_t begin = 0; begin < n; begin += kBlockNumel) {
    const int64_t count = std::min(kBlockNumel, n - begin);
    bool first = !accumulate;
    for (const void* source : sources) {
      const void* block = static_cast<const char*>(source) + begin * element_bytes;
      (first ? loops.assign : loops.add)(destination + begin, block, count);
      first = false;
    }
  }
}

}  // namespace fsdp::kernels
