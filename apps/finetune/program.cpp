#include "apps/finetune/program.h"

#include <algorithm>
#include <cstdio>

#include "libfsdp/base/error.h"

namespace fsdp::app {
namespace {

const Command* const kCommands[] = {&kTrainCommand,    &kEvalCommand,    &kGenerateCommand,
                                    &kMergeCommand,    &kConvertCommand, &kNewModelCommand,
                                    &kShowDataCommand, &kVerifyCommand,  &kEnvCommand};

constexpr std::string_view kUsage =
    "finetune: trains, evaluates and runs Llama-family models in Hugging Face format, fully "
    "sharded.\n\n"
    "Usage: finetune [COMMAND] [--option value ...]\n\nCommands (train when none is named):\n";

constexpr std::string_view kNotes =
    "\nfinetune COMMAND --help lists a command's options; docs/configuration.md has all of them.\n"
    "--option=value works too, a dash counts as an underscore, --config FILE.yaml reads options "
    "from a file.\n\n"
    "Exit codes: 0 done, 1 internal error, 2 options, 3 data, 4 model files, 5 predicted not to "
    "fit, 6 device memory,\n"
    "7 host memory or disk, 8 communication or a lost rank, 9 not a number, 75 stopped by a signal "
    "with a\ncheckpoint saved, 130 interrupted with nothing saved.\n";

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

std::string usage() {
  std::string text(kUsage);
  for (const auto* command : kCommands) {
    text += cat("  ", command->name, std::string(12 - command->name.size(), ' '), command->summary,
                "\n");
  }
  return text + std::string(kNotes);
}

/// docs/configuration.md.
std::string markdown() {
  std::string text =
      "# Options of `finetune`\n\nWritten by `finetune --help-markdown`; a test keeps it equal to "
      "the program. Names may "
      "be written with\ndashes. Precedence: defaults, then `--config FILE.yaml` (flat `name: "
      "value` lines), then the "
      "command line.\n";
  for (const auto* command : kCommands) {
    text += cat("\n## finetune ", command->name, "\n\n", command->summary, "\n",
                help_markdown(command->fields()));
  }
  return text;
}

const Command* find_command(std::string_view name) {
  for (const auto* command : kCommands) {
    if (command->name == name) return command;
  }
  return nullptr;
}

[[noreturn]] void refuse_command(const std::string& name) {
  std::vector<std::string> known;
  for (const auto* command : kCommands) known.emplace_back(command->name);
  const auto nearest = nearest_name(known, name);
  throw ConfigError(cat(
      "[options] '", name, "' is not a command of finetune.",
      nearest.empty() ? " Hint: finetune --help lists them." : " Did you mean '" + nearest + "'?"));
}

bool asks_help(const std::vector<std::string>& arguments) {
  return std::any_of(arguments.begin(), arguments.end(),
                     [](const std::string& text) { return text == "--help" || text == "-h"; });
}

int print_and_leave(const std::string& text) {
  print(text);
  return 0;
}

}  // namespace

int run_program(const std::vector<std::string>& argv) {
  Invocation call{"finetune train", {argv.begin() + 1, argv.end()}, argv};
  if (call.arguments.empty() || call.arguments[0] == "help") return print_and_leave(usage());
  const auto& first = call.arguments[0];
  if (first == "--help" || first == "-h") return print_and_leave(usage());
  if (first == "--version") return print_and_leave(cat("finetune ", FSDP_VERSION, "\n"));
  if (first == "--help-markdown") return print_and_leave(markdown());
  const Command* command = &kTrainCommand;
  if (!first.starts_with("-")) {
    command = find_command(first);
    if (command == nullptr) refuse_command(first);
    call.arguments.erase(call.arguments.begin());
    call.program = cat("finetune ", command->name);
  }
  if (asks_help(call.arguments)) {
    print(cat(call.program, ": ", command->summary, "\n\n"));
    return print_and_leave(help_text(command->fields()));
  }
  return command->run(call);
}

}  // namespace fsdp::app
