// The sub-commands of finetune and what is common to them.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/base/fields.h"

namespace fsdp::app {

/// One call of a sub-command.
struct Invocation {
  std::string program;                 ///< "finetune train", for messages.
  std::vector<std::string> arguments;  ///< Behind the command's name.
  std::vector<std::string> argv;       ///< All, to start ranks with.
};

/// A sub-command, one file each.
struct Command {
  std::string_view name;
  std::string_view summary;
  FieldList (*fields)();  ///< With the defaults; valid until the next call.
  int (*run)(const Invocation&);
};

extern const Command kTrainCommand, kEvalCommand, kGenerateCommand, kMergeCommand, kConvertCommand,
    kNewModelCommand, kShowDataCommand, kVerifyCommand, kEnvCommand;

/// main without the error handling: finds the command (train when none is named), answers --help
/// and --version.
int run_program(const std::vector<std::string>& argv);

/// Options read from flags and yaml, and checked against each other.
template <class Options>
Options load_checked(const Invocation& invocation) {
  Options options;
  const auto origins = load_options(fields_of(options), invocation.arguments, invocation.program);
  options.check(origins);
  return options;
}

/// Command::fields for an options struct.
template <class Options>
FieldList default_fields() {
  static Options options;
  options = Options();
  return fields_of(options);
}

/// The options that this call resolved to, as JSON; for a file beside the results.
template <class Options>
std::string resolved_json(Options& options) {
  return fields_json(fields_of(options));
}

}  // namespace fsdp::app
