#include "libfsdp/models/small_gemm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <array>
#include <exception>

namespace fsdp::models {
namespace {

bool micro_kernel_works() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx512f")) return false;
  try {
    std::array<float, 256> a{}, b{}, c{};
    for (size_t i = 0; i < 16; ++i) a[i * 17] = 1.0F;  // the identity
    for (size_t i = 0; i < 256; ++i) b[i] = static_cast<float>(i);
    at::native::cpublas::brgemm(16, 16, 16, int64_t{16}, int64_t{16}, int64_t{16}, false, a.data(),
                                b.data(), c.data());
    at::native::cpublas::brgemm_release(false);
    return b == c;
  } catch (const std::exception&) {
    return false;  // this LibTorch was built without it
  }
#else
  return false;
#endif
}

at::Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1}, at::kFloat);
}

}  // namespace

void small_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_stride, const float* b,
                int64_t b_stride, float* c, int64_t c_stride, bool accumulate) {
  static const bool micro_kernel = micro_kernel_works();
  if (micro_kernel) {
    at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, accumulate, a, b, c);
    return;
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor to = matrix(c, m, n, c_stride);
  if (accumulate) {
    at::addmm_out(to, to, matrix(a, m, k, a_stride), matrix(b, k, n, b_stride));
  } else {
    at::mm_out(to, matrix(a, m, k, a_stride), matrix(b, k, n, b_stride));
  }
}

void small_gemm_done() { at::native::cpublas::brgemm_release(false); }

}  // namespace fsdp::models
