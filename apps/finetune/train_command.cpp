#include "apps/finetune/program.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/ranks.h"
#include "libfsdp/trainer/train.h"

namespace fsdp::app {
namespace {

using trainer::TrainOptions;

int run(const Invocation& call) {
  auto options = load_checked<TrainOptions>(call);
  const auto resolved = resolved_json(options);
  int code = 0;  // Of this process, when it is a rank.
  const int failure = trainer::run_on_ranks(
      options.ranks, call.argv, [&] { trainer::check_train(options); },
      [&](comm::Communicator& comm) { code = trainer::run_train(options, resolved, comm); });
  return failure != 0 ? failure : code;
}

}  // namespace

const Command kTrainCommand = {"train",
                               "Fine-tunes a model, parts of it or adapters on a file of records.",
                               default_fields<TrainOptions>, run};

}  // namespace fsdp::app
