// Where the tensors of a process lie on the CPU.
#pragma once

namespace fsdp::models {

/// Gives CPU tensors of 64 KiB and more a heap of their own, see device::BlockHeap: the high-water
/// mark of training steps is then what they have in use, and their pages are never given back.
/// Returns whether it did; where addresses cannot be reserved nothing changes.
///
/// Process-wide; call it from a program, before ranks start or large tensors exist. A second call
/// does nothing.
bool use_tensor_heap();

}  // namespace fsdp::models
