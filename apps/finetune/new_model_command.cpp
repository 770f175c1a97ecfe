#include "apps/finetune/program.h"
#include "libfsdp/trainer/new_model.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::app {
namespace {

using trainer::NewModelOptions;

int run(const Invocation& call) {
  trainer::run_new_model(load_checked<NewModelOptions>(call));
  return 0;
}

}  // namespace

const Command kNewModelCommand = {"new-model", "Writes a model with random weights, for tests.",
                                  default_fields<NewModelOptions>, run};

}  // namespace fsdp::app
