#include "apps/finetune/program.h"
#include "libfsdp/trainer/merge.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::app {
namespace {

using trainer::MergeOptions;

int run(const Invocation& call) {
  trainer::run_merge(load_checked<MergeOptions>(call));
  return 0;
}

}  // namespace

const Command kMergeCommand = {"merge", "Merges an adapter into its base model.",
                               default_fields<MergeOptions>, run};

}  // namespace fsdp::app
