#include "apps/finetune/program.h"
#include "libfsdp/trainer/generate.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/ranks.h"

namespace fsdp::app {
namespace {

using trainer::GenerateOptions;

int run(const Invocation& call) {
  const auto options = load_checked<GenerateOptions>(call);
  return trainer::run_on_ranks(
      options.ranks, call.argv, [&] { trainer::check_generate(options); },
      [&](comm::Communicator& comm) { trainer::run_generate(options, comm); });
}

}  // namespace

const Command kGenerateCommand = {"generate",
                                  "Answers or continues a prompt, streaming to the terminal.",
                                  default_fields<GenerateOptions>, run};

}  // namespace fsdp::app
