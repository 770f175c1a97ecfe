#include "libfsdp/models/tensor_memory.h"

#include <c10/core/CPUAllocator.h>
#include <unistd.h>

#include "libfsdp/base/error.h"
#include "libfsdp/device/block_heap.h"

namespace fsdp::models {
namespace {

constexpr size_t kLeastBytes = 64 << 10;

// Neither is ever destroyed: tensors may outlive all static objects.
device::BlockHeap* heap = nullptr;
c10::Allocator* others = nullptr;

void release(void* block) {
  if (block == nullptr) return;
  heap->owns(block) ? heap->release(block) : others->raw_deallocate(block);
}

class TensorAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes >= kLeastBytes ? heap->allocate(bytes) : nullptr;
    if (block == nullptr) block = others->raw_allocate(bytes);
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

bool use_tensor_heap() {
  if (heap != nullptr) return true;
  const auto memory =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  c10::Allocator* const before = c10::GetCPUAllocator();
  if (before->raw_deleter() == nullptr) return false;
  try {
    heap = new device::BlockHeap(memory);
  } catch (const HostResourceError&) {
    return false;
  }
  others = before;
  c10::SetCPUAllocator(new TensorAllocator, /*priority=*/1);
  return true;
}

}  // namespace fsdp::models
