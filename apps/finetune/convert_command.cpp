#include "apps/finetune/program.h"
#include "libfsdp/trainer/convert.h"
#include "libfsdp/trainer/options.h"

namespace fsdp::app {
namespace {

using trainer::ConvertOptions;

int run(const Invocation& call) {
  trainer::run_convert(load_checked<ConvertOptions>(call));
  return 0;
}

}  // namespace

const Command kConvertCommand = {"convert",
                                 "Converts models and checkpoints between formats and types.",
                                 default_fields<ConvertOptions>, run};

}  // namespace fsdp::app
