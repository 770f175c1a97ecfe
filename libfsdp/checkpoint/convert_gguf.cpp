#include "libfsdp/checkpoint/convert_gguf.h"

#include <functional>
#include <numeric>

namespace fsdp::checkpoint {

StateDict gguf_state(const std::shared_ptr<const io::GgufLlama>& model) {
  StateDict state;
  for (const io::NamedShape& tensor : model->config().expected_tensors()) {
    TensorPart part{.name = tensor.name, .shape = tensor.shape};
    part.numel =
        std::accumulate(part.shape.begin(), part.shape.end(), int64_t{1}, std::multiplies<>());
    part.read = [model, name = tensor.name](int64_t at, std::span<std::byte> to) {
      model->read(name, at, {reinterpret_cast<float*>(to.data()), to.size() / sizeof(float)});
    };
    state.tensors.push_back(std::move(part));
  }
  return state;
}

}  // namespace fsdp::checkpoint
