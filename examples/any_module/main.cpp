// A user's program: two ranks as threads train a small module, fully sharded.
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>

#include <cstdio>
#include <thread>
#include <vector>

#include "libfsdp/comm/thread_world.h"
#include "libfsdp/shard/sharded.h"

struct NetImpl : torch::nn::Module {
  NetImpl() : first(8, 16), second(16, 1) {
    register_module("first", first);
    register_module("second", second);
  }
  at::Tensor forward(const at::Tensor& x) { return second->forward(at::tanh(first->forward(x))); }
  fsdp::Unit<torch::nn::Linear> first, second;
};
TORCH_MODULE(Net);

int main() {
  std::vector<double> losses;
  fsdp::comm::ThreadWorld world(2);
  torch::manual_seed(0);
  std::vector<Net> nets = {Net(), Net()};
  const auto rank_main = [&](int rank) {
    auto sharded = fsdp::fully_shard(nets[rank], std::shared_ptr(world.communicator(rank)));
    const at::Tensor x = at::linspace(-1, 1, 64).view({8, 8}) + rank;
    const at::Tensor y = 0.2 * x.sum(1, /*keepdim=*/true);
    for (int i = 0; i < 100; ++i) {
      auto step = sharded.begin_step(1);
      step.backward((sharded(x) - y).square().sum(), x.size(0));
      const fsdp::StepStats stats = step.finish({.learning_rate = 0.02});
      if (rank == 0) losses.push_back(stats.loss);
    }
  };
  std::thread other(rank_main, 1);
  rank_main(0);
  other.join();
  std::printf("loss %.4f -> %.4f\n", losses.front(), losses.back());
  return losses.back() < 0.5 * losses.front() ? 0 : 1;
}
