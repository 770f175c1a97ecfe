#include "apps/finetune/program.h"
#include "libfsdp/trainer/evaluate.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/ranks.h"

namespace fsdp::app {
namespace {

using trainer::EvalOptions;

int run(const Invocation& call) {
  const auto options = load_checked<EvalOptions>(call);
  return trainer::run_on_ranks(
      options.ranks, call.argv, [&] { trainer::check_eval(options); },
      [&](comm::Communicator& comm) { trainer::run_eval(options, comm); });
}

}  // namespace

const Command kEvalCommand = {"eval", "Loss and perplexity of a model on a file of records.",
                              default_fields<EvalOptions>, run};

}  // namespace fsdp::app
