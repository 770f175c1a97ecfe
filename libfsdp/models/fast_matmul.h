// Which library multiplies fp32 matrices on the CPU.
#pragma once

namespace fsdp::models {

/// Lets oneDNN instead of MKL multiply fp32 matrices where that is faster: on AMD processors with
/// AVX-512, on which MKL stays with AVX2 kernels (105 against 230 GFLOP/s per core on a Zen 5).
/// Returns whether it did.
///
/// The results are full fp32 products in another order of summation; on SmolLM2-135M the logits are
/// 1.4 times as far from fp64 as with MKL (rms 1.14e-5 and 8.3e-6 of 38). ATen's name for this
/// choice is "bf16 allowed", which oneDNN makes use of on processors with AMX only: there, and
/// wherever a probe finds rounded products, nothing is changed.
///
/// Process-wide: call it once, before the ranks start, from a program. All ranks must call it.
bool use_fast_float32_matmul();

}  // namespace fsdp::models
