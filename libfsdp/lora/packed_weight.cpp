#include "libfsdp/lora/packed_weight.h"

#include <ATen/ATen.h>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/kernels/device_compute.h"
#include "libfsdp/shard/shell.h"

namespace fsdp::lora {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kScaleBytes = sizeof(float);
constexpr int64_t kNestedBlock = 256;

int64_t aligned(int64_t bytes) { return round_up(bytes, kAlignment); }

}  // namespace

int64_t PackedWeight::scales_at() const { return aligned(code_bytes()); }

int64_t PackedWeight::nested_at() const {
  return scales_at() + aligned(double_quant ? scales() : scales() * kScaleBytes);
}

int64_t PackedWeight::offset_at() const {
  if (!double_quant) return nested_at();
  return nested_at() + aligned((scales() + kNestedBlock - 1) / kNestedBlock * kScaleBytes);
}

int64_t PackedWeight::bytes() const { return offset_at() + (double_quant ? kAlignment : 0); }

at::Tensor unpack(const PackedWeight& weight, const at::Tensor& packed, at::ScalarType type) {
  check(packed.numel() == weight.bytes(), "a packed weight of another size");
  kernels::Compute& compute =
      packed.is_cuda() ? kernels::device_compute(packed.get_device()) : kernels::host_compute();
  const auto* bytes = packed.data_ptr<uint8_t>();
  at::Tensor values = at::empty({weight.rows, weight.columns}, packed.options().dtype(type));
  const DType dtype = to_dtype(type);
  const auto* scales = reinterpret_cast<const float*>(bytes + weight.scales_at());
  at::Tensor plain_scales;
  if (weight.double_quant) {
    plain_scales = at::empty({weight.scales()}, packed.options().dtype(at::kFloat));
    compute.dequantize_absmax(bytes + weight.scales_at(),
                              reinterpret_cast<const float*>(bytes + weight.nested_at()), 0, 0,
                              weight.scales(), plain_scales.data_ptr<float>());
    // Where the offset lies, without bringing it to the host. The bits are those of one call with
    // it: a product and a sum, rounded one after the other.
    plain_scales.add_(packed.narrow(0, weight.offset_at(), kScaleBytes).view(at::kFloat));
    scales = plain_scales.data_ptr<float>();
  }
  if (weight.format == PackedFormat::kInt8) {
    compute.dequantize_int8(reinterpret_cast<const int8_t*>(bytes), scales, weight.columns, 0,
                            weight.numel(), values.data_ptr(), dtype);
  } else {
    const auto code = weight.format == PackedFormat::kNf4 ? kernels::FourBitCode::kNf4
                                                          : kernels::FourBitCode::kFp4;
    compute.dequantize_4bit(bytes, scales, weight.numel(), code, weight.blocksize,
                            values.data_ptr(), dtype);
  }
  return values;
}

}  // namespace fsdp::lora
