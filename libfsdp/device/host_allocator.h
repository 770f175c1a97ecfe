// The process's general allocator, for programs that run steps of equal temporaries.
#pragma once

namespace fsdp::device {

/// Makes malloc keep what it has: freed blocks up to 1 GiB are reused instead of returned to the
/// kernel, so that the temporaries of one step are not page-faulted again in the next (that costs
/// about a third of a CPU step).
///
/// Process-wide; call it first thing in main(), before other threads exist: it also makes threads
/// share one arena, for blocks above 64 MiB cannot be kept in the others. The memory of the largest
/// step stays with the process. Returns false where the C library has no such knobs (then nothing
/// changed).
bool tune_host_allocator();

/// Gives the pages of all freed blocks back to the kernel: for a program that has started, loaded
/// its model, and will not need as much again. Returns whether there were any.
bool trim_host_allocator();

}  // namespace fsdp::device
