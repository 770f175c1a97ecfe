#include "apps/finetune/program.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/show_data.h"

namespace fsdp::app {
namespace {

using trainer::ShowDataOptions;

int run(const Invocation& call) {
  trainer::run_show_data(load_checked<ShowDataOptions>(call));
  return 0;
}

}  // namespace

const Command kShowDataCommand = {
    "show-data", "Shows the tokens of a data file and which of them are trained on.",
    default_fields<ShowDataOptions>, run};

}  // namespace fsdp::app
