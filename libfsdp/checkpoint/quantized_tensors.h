// Weights that bitsandbytes quantised, as tensors of a model directory.
//
// Note [Quantised tensors] In 4 bits a weight `w` is `w` (two codes per byte, in elements of any
// storage type, [n, 1]), `w.absmax`, `w.quant_map` (the 16 values),
// `w.quant_state.bitsandbytes__nf4` or `__fp4` (JSON as bytes: quant_type, blocksize, dtype,
// shape), and with double quantisation `w.absmax` as U8, `w.nested_absmax`, `w.nested_quant_map`
// and three more members of the JSON. In int8 the weight `<m>.weight` is I8 in its own shape,
// `<m>.SCB` has the largest magnitude of each row, `<m>.weight_format` is 0.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/stored_reader.h"
#include "libfsdp/io/quantization_config.h"
#include "libfsdp/kernels/four_bit.h"

namespace fsdp::checkpoint {

/// One quantised weight. A plain value.
struct QuantizedWeight {
  std::string name;  ///< "model.layers.0.mlp.up_proj.weight"
  io::QuantKind kind = io::QuantKind::kNf4;
  std::vector<int64_t> shape;  ///< Of the weight before it was quantised.
  int64_t numel = 0;
  DType dtype = DType::kBF16;  ///< That it was quantised from; int8: what it is read as, f32.
  DType storage = DType::kU8;  ///< Element type of the codes in files.
  int64_t blocksize = 64;      ///< Elements per scale; int8: of a row.
  bool double_quant = false;
  float offset = 0;  ///< Double quantisation: of a file's; else see QuantizedReader.

  bool is_int8() const { return kind == io::QuantKind::kInt8; }
  kernels::FourBitCode code() const {
    return kind == io::QuantKind::kNf4 ? kernels::FourBitCode::kNf4 : kernels::FourBitCode::kFp4;
  }
  int64_t num_scales() const { return (numel + blocksize - 1) / blocksize; }
  /// Bytes of codes of the first n elements.
  int64_t code_bytes(int64_t n) const { return is_int8() ? n : (n + 1) / 2; }
  std::string scales_name() const;  ///< "....weight.absmax" or "....SCB"
};

using QuantizedWeights = std::map<std::string, QuantizedWeight, std::less<>>;

/// The quantised weights among the stored tensors, none if there are none. All parts are checked:
/// that they are there, their types and sizes, the tables' bits. Reads a few KB per weight.
/// Throws: ModelError naming tensor, what it is and what was expected.
QuantizedWeights find_quantized_weights(StoredReader& reader);

/// Names of the tensors that a quantised weight consists of in files, besides its own.
std::vector<std::string> quantized_part_names(const QuantizedWeight& weight);

/// The JSON of a 4-bit weight, with Python's spelling.
std::string quant_state_text(const QuantizedWeight& weight, float offset);

}  // namespace fsdp::checkpoint
