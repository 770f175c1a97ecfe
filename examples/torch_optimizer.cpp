// An optimizer of torch::optim over the local shards of a sharded module:
//   torch_optimizer 2    or   torchrun --no-python --nproc_per_node 2 torch_optimizer
#include <torch/nn/modules/linear.h>
#include <torch/optim/rmsprop.h>
#include <torch/utils.h>

#include <cstdio>
#include <vector>

#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/gloo/transport.h"
#include "libfsdp/shard/init.h"
#include "libfsdp/shard/sharded.h"

struct NetImpl : torch::nn::Module {
  fsdp::Unit<torch::nn::Linear> first{8, 32}, second{32, 1};
  NetImpl() { register_module("first", first), register_module("second", second); }
  at::Tensor forward(const at::Tensor& x) { return second->forward(at::tanh(first->forward(x))); }
};
TORCH_MODULE(Net);

int train(fsdp::comm::Communicator& comm) {
  auto model = fsdp::fully_shard(Net(), {std::shared_ptr<void>(), &comm});
  model.initialize(fsdp::default_initializer(*model.module(), /*seed=*/1));

  std::vector<at::Tensor>
      shards;  // This rank's pieces: the optimizer's state is sharded like them.
  for (const fsdp::LocalShard& shard : model.local_shards()) shards.push_back(shard.value);
  torch::optim::RMSprop optimizer(shards, torch::optim::RMSpropOptions(1e-3).momentum(0.9));

  double first = 0, last = 0;
  for (int s = 0; s < 100; ++s) {
    auto step = model.begin_step(1);
    torch::manual_seed(static_cast<uint64_t>(s * comm.size() + comm.rank()));
    const at::Tensor x = at::rand({32, 8}), y = x.sum(1, /*keepdim=*/true);
    step.backward((model(x) - y).square().sum(), x.size(0));
    // The gradients are those of the mean over all ranks, clipped, while the function runs.
    last = step.finish_with({.max_grad_norm = 1}, [&] { optimizer.step(); }).loss;
    if (s == 0) first = last;
    if (comm.rank() == 0 && s % 10 == 0) std::printf("step %3d loss %.6f\n", s, last);
  }
  const at::Tensor whole = model.full_parameter("first.weight");  // Of all ranks, on every rank.
  if (comm.rank() == 0) std::printf("norm of first.weight %.6f\n", whole.norm().item<double>());
  return last < 0.1 * first ? 0 : 1;
}

int main(int argc, char** argv) {
  if (argc > 1 && !fsdp::comm::started_as_rank())
    return fsdp::comm::launch_local(std::stoi(argv[1]), {argv[0]});
  return fsdp::comm::run_rank(train, {.join = {.transports = {fsdp::gloo::transport()}}});
}
