// What the parts of the CUDA stand-in share (see cuda_stand_in.cpp).
#pragma once

#include <cstddef>
#include <functional>

namespace fsdp::stand_in {

inline constexpr int kInvalid = 1;
inline constexpr int kNoMemory = 2;

/// Runs `work` on a stream (null = the calling thread's default stream), after what is there. 0.
int enqueue(void* stream, std::function<void()> work);
/// Memory that is not zero; 0 or kNoMemory.
int allocate(void** memory, size_t bytes);
int free_memory(void* memory);

}  // namespace fsdp::stand_in
