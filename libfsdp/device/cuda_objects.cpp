#include "libfsdp/device/cuda_objects.h"

#include "libfsdp/device/cuda_loader.h"

namespace fsdp::device {
namespace {

void* made(int code, void* handle, const char* what) {
  check_cuda(code, what);
  return handle;
}

void* make_stream(CudaStream::Priority priority) {
  void* stream = nullptr;
  const int code =
      cuda_runtime().create_stream(&stream, priority == CudaStream::Priority::kHigh ? 1 : 0);
  return made(code, stream, "creating a CUDA stream");
}

void* make_event(CudaEvent::Timing timing) {
  void* event = nullptr;
  const int code = cuda_runtime().create_event(&event, timing == CudaEvent::Timing::kOn ? 1 : 0);
  return made(code, event, "creating a CUDA event");
}

void* make_shared_event() {
  void* event = nullptr;
  const int code = cuda_runtime().create_shared_event(&event);
  return made(code, event, "creating a shared CUDA event");
}

void* open_event(const CudaIpcHandle& handle) {
  void* event = nullptr;
  const int code = cuda_runtime().open_event(&event, handle.bytes.data());
  return made(code, event, "opening a CUDA event of another rank");
}

void* open_memory(const CudaIpcHandle& handle) {
  void* memory = nullptr;
  const int code = cuda_runtime().open_memory(&memory, handle.bytes.data());
  return made(code, memory, "opening device memory of another rank");
}

void* make_device_memory(size_t bytes) {
  void* memory = nullptr;
  if (bytes == 0) return nullptr;
  const int code = cuda_runtime().allocate_device(&memory, bytes);
  return made(code, memory, "allocating device memory");
}

void* make_pinned_memory(size_t bytes) {
  void* memory = nullptr;
  if (bytes == 0) return nullptr;
  const int code = cuda_runtime().allocate_pinned(&memory, bytes);
  return made(code, memory, "allocating pinned host memory");
}

}  // namespace

void destroy_cuda_stream(void* stream) { cuda_runtime().destroy_stream(stream); }
void destroy_cuda_event(void* event) { cuda_runtime().destroy_event(event); }
void free_cuda_device(void* memory) { cuda_runtime().free_device(memory); }
void free_cuda_pinned(void* memory) { cuda_runtime().free_pinned(memory); }
void close_cuda_memory(void* memory) { cuda_runtime().close_memory(memory); }

CudaStream::CudaStream(Priority priority) : handle_(make_stream(priority)) {}

void CudaStream::wait(const CudaEvent& event) const {
  check_cuda(cuda_runtime().stream_wait_event(get(), event.get()),
             "making a CUDA stream wait for an event");
}

void CudaStream::synchronize() const {
  check_cuda(cuda_runtime().synchronize_stream(get()), "waiting for a CUDA stream");
}

CudaEvent::CudaEvent(Timing timing) : handle_(make_event(timing)) {}

void CudaEvent::record(const CudaStream& stream) const {
  check_cuda(cuda_runtime().record_event(get(), stream.get()), "recording a CUDA event");
}

bool CudaEvent::done() const {
  int done = 0;
  check_cuda(cuda_runtime().query_event(get(), &done), "asking for a CUDA event");
  return done != 0;
}

void CudaEvent::synchronize() const {
  check_cuda(cuda_runtime().synchronize_event(get()), "waiting for a CUDA event");
}

float CudaEvent::elapsed_ms(const CudaEvent& begin) const {
  float milliseconds = 0;
  check_cuda(cuda_runtime().elapsed_ms(begin.get(), get(), &milliseconds),
             "timing between CUDA events");
  return milliseconds;
}

CudaBuffer::CudaBuffer(size_t bytes) : handle_(make_device_memory(bytes)), bytes_(bytes) {}
PinnedBuffer::PinnedBuffer(size_t bytes) : handle_(make_pinned_memory(bytes)), bytes_(bytes) {}

SharedCudaEvent::SharedCudaEvent() : handle_(make_shared_event()) {}
SharedCudaEvent::SharedCudaEvent(const CudaIpcHandle& of_other) : handle_(open_event(of_other)) {}

CudaIpcHandle SharedCudaEvent::handle() const {
  CudaIpcHandle handle;
  check_cuda(cuda_runtime().get_event_handle(handle.bytes.data(), get()), "sharing a CUDA event");
  return handle;
}

OpenedCudaMemory::OpenedCudaMemory(const CudaIpcHandle& of_other)
    : handle_(open_memory(of_other)) {}

CudaIpcHandle cuda_memory_handle(void* memory) {
  CudaIpcHandle handle;
  check_cuda(cuda_runtime().get_memory_handle(handle.bytes.data(), memory),
             "sharing device memory");
  return handle;
}

void record_event(void* event, void* stream) {
  check_cuda(cuda_runtime().record_event(event, stream), "recording a CUDA event");
}

void wait_event(void* stream, void* event) {
  check_cuda(cuda_runtime().stream_wait_event(stream, event),
             "making a CUDA stream wait for an event");
}

void copy_async(void* to, const void* from, size_t bytes, const CudaStream& stream) {
  check_cuda(cuda_runtime().copy_async(to, from, bytes, stream.get()),
             "copying to or from a CUDA device");
}

void fill_async(void* memory, uint8_t value, size_t bytes, const CudaStream& stream) {
  check_cuda(cuda_runtime().fill_async(memory, value, bytes, stream.get()),
             "filling device memory");
}

void set_cuda_device(int device) {
  check_cuda(cuda_runtime().set_device(device), "choosing a CUDA device");
}

CudaMemoryInfo cuda_memory_info() {
  CudaMemoryInfo info;
  check_cuda(cuda_runtime().memory_info(&info.free_bytes, &info.total_bytes),
             "asking for device memory");
  return info;
}

}  // namespace fsdp::device
