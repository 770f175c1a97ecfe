// From 4-bit codes to elements: the loop that is as fast as memory only with shuffles. For our .cpp
// files.
#pragma once

#include "libfsdp/base/dtype.h"
#include "libfsdp/kernels/element_stores.h"
#include "libfsdp/kernels/four_bit.h"

namespace fsdp::kernels {

struct FourBitRange {
  const uint8_t* packed;
  const float* absmax;
  int64_t numel;
  const float* table;  ///< 16 values by code.
  int64_t blocksize;   ///< Even.
  void* values;
};

/// As dequantize_4bit(), the elements being of type f32, bf16 or f16.
void expand_four_bit(const FourBitRange& range, DType dtype);

}  // namespace fsdp::kernels
