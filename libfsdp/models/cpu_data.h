// From tensors to the plain pointers of the CPU loops.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fsdp::models {

/// Whether the fused CPU loops take this tensor; everything else goes through composed ATen
/// operations.
inline bool on_fused_cpu(const at::Tensor& t) {
  return t.device().is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16);
}

/// Calls fn(T{}) with T = float or uint16_t (bfloat16 bits).
template <class F>
void for_cpu_type(const at::Tensor& t, F&& fn) {
  if (t.scalar_type() == at::kFloat) {
    fn(float{});
  } else {
    fn(uint16_t{});
  }
}

template <class T>
const T* in(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace fsdp::models
