// A whole training loop for a module of your own, fully sharded, under any launcher:
//   custom_loop 4        or   torchrun --no-python --nproc_per_node 4 custom_loop   (srun, mpirun)
// Any number of ranks prints the same losses.
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/utils.h>
#include <cstdio>

#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/gloo/transport.h"
#include "libfsdp/shard/dropout.h"
#include "libfsdp/shard/init.h"
#include "libfsdp/shard/sharded.h"

constexpr int kMicroBatches = 4;  // Of all ranks, in a step.
struct BlockImpl : torch::nn::Module {
  torch::nn::LayerNorm norm{torch::nn::LayerNormOptions({64})};
  torch::nn::Linear up{64, 256}, down{256, 64};
  BlockImpl() {
    register_module("norm", norm), register_module("up", up), register_module("down", down);
  }
  at::Tensor forward(const at::Tensor& x) {
    return x + fsdp::dropout(down(at::gelu(up(norm(x)))), 0.1, is_training());
  }
};
TORCH_MODULE(Block);
struct NetImpl : torch::nn::Module {
  torch::nn::Linear stem{16, 64}, head{64, 1};
  fsdp::Unit<Block> a, b, c;  // Gathered one at a time; instead of: Block a, b, c;
  NetImpl() {
    register_module("stem", stem), register_module("head", head);
    register_module("a", a), register_module("b", b), register_module("c", c);
  }
  at::Tensor forward(const at::Tensor& x) {
    return head(c->forward(b->forward(a->forward(stem(x)))));
  }
};
TORCH_MODULE(Net);
int train(fsdp::comm::Communicator& comm) {
  auto model = fsdp::fully_shard(Net(), {std::shared_ptr<void>(), &comm}, {.deterministic = true});
  model.initialize(fsdp::default_initializer(*model.module(), /*seed=*/1));
  double loss = 0;
  for (int s = 0; s < 100; ++s) {
    auto step = model.begin_step((kMicroBatches - comm.rank() + comm.size() - 1) / comm.size());
    for (int m = comm.rank(); m < kMicroBatches; m += comm.size()) {
      torch::manual_seed(static_cast<uint64_t>(s * kMicroBatches + m));  // In place of a data set.
      const at::Tensor x = at::rand({32, 16}), y = x.square().sum(1, /*keepdim=*/true);
      step.backward((model(x) - y).square().sum(), x.size(0));  // A sum, and how many it is over.
    }
    loss = step.finish({.learning_rate = 1e-3, .max_grad_norm = 1}).loss;
    if (comm.rank() == 0 && s % 10 == 0) std::printf("step %3d loss %.6f\n", s, loss);
  }
  return loss < 1 ? 0 : 1;  // 29 at first.
}
int main(int argc, char** argv) {
  if (argc > 1 && !fsdp::comm::started_as_rank())
    return fsdp::comm::launch_local(std::stoi(argv[1]), {argv[0]});
  return fsdp::comm::run_rank(train, {.join = {.transports = {fsdp::gloo::transport()}}});
}
