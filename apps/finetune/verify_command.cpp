#include "apps/finetune/program.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/verify.h"

namespace fsdp::app {
namespace {

using trainer::VerifyOptions;

int run(const Invocation& call) {
  // `finetune verify DIR`: the folder needs no name.
  Invocation named = call;
  if (!named.arguments.empty() && !named.arguments[0].starts_with("-"))
    named.arguments[0] = "--dir=" + named.arguments[0];
  return static_cast<int>(trainer::run_verify(load_checked<VerifyOptions>(named)));
}

}  // namespace

const Command kVerifyCommand = {"verify",
                                "Checks every byte of a checkpoint, or of all in a folder.",
                                default_fields<VerifyOptions>, run};

}  // namespace fsdp::app
