// A training loop that can be stopped at any moment and goes on where it was, on any number of
// ranks, with the same bits as if it had never been stopped:
//   checkpointed_loop 2 run 30      30 steps on 2 ranks, a checkpoint every 10
//   checkpointed_loop 4 run 100     goes on at step 30, on 4 ranks, up to step 100
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>

#include <cstdio>

#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/shard/checkpointer.h"
#include "libfsdp/shard/dropout.h"
#include "libfsdp/shard/init.h"

constexpr int kMicroBatches = 4;  // Of all ranks, in a step.

struct BlockImpl : torch::nn::Module {
  torch::nn::Linear up{32, 128}, down{128, 32};
  BlockImpl() { register_module("up", up), register_module("down", down); }
  at::Tensor forward(const at::Tensor& x) {
    return x + fsdp::dropout(down(at::gelu(up(x))), 0.1, is_training());
  }
};
TORCH_MODULE(Block);

struct NetImpl : torch::nn::Module {
  torch::nn::Linear stem{16, 32}, head{32, 1};
  fsdp::Unit<Block> a, b;
  NetImpl() {
    register_module("stem", stem), register_module("head", head);
    register_module("a", a), register_module("b", b);
  }
  at::Tensor forward(const at::Tensor& x) { return head(b->forward(a->forward(stem(x)))); }
};
TORCH_MODULE(Net);

/// Anything with these two functions is saved and loaded with the model.
struct Mean {
  double sum = 0;
  int64_t steps = 0;
  std::string state() const {
    return fsdp::io::Json::object({{"sum", sum}, {"steps", steps}}).dump();
  }
  void load_state(const std::string& text) {
    const auto json = fsdp::io::Json::parse(text, "mean");
    sum = json.get<double>("sum"), steps = json.get<int64_t>("steps");
  }
};

int train(fsdp::comm::Communicator& comm, const std::string& directory, int64_t total) {
  auto model = fsdp::fully_shard(Net(), {std::shared_ptr<void>(), &comm}, {.deterministic = true});
  model.initialize(fsdp::default_initializer(*model.module(), /*seed=*/1));
  Mean mean;
  fsdp::Checkpointer checkpoints(model,
                                 {.directory = directory, .async = true, .save_total_limit = 2});
  checkpoints.add("mean", mean);
  for (int64_t s = checkpoints.resume("auto").value_or(0); s < total; checkpoints.poll()) {
    auto step = model.begin_step((kMicroBatches - comm.rank() + comm.size() - 1) / comm.size());
    for (int m = comm.rank(); m < kMicroBatches; m += comm.size()) {
      torch::manual_seed(static_cast<uint64_t>(s * kMicroBatches + m));  // In place of a data set.
      const at::Tensor x = at::rand({32, 16}), y = x.square().sum(1, /*keepdim=*/true);
      step.backward((model(x) - y).square().sum(), x.size(0));
    }
    mean.sum += step.finish({.learning_rate = 1e-3}).loss, ++mean.steps;
    if (++s % 10 == 0) checkpoints.save(s);
  }
  checkpoints.wait();
  if (comm.rank() == 0)
    std::printf("mean loss of %ld steps: %a\n", static_cast<long>(mean.steps), mean.sum / total);
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "%s RANKS DIRECTORY STEPS\n", argv[0]), 2;
  if (!fsdp::comm::started_as_rank())
    return fsdp::comm::launch_local(std::stoi(argv[1]), {argv, argv + argc});
  return fsdp::comm::run_rank(
      [&](auto& comm) { return train(comm, argv[2], std::stoll(argv[3])); });
}
