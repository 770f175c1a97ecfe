// The one reader: files of any form into a StateDict, each rank only its own bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/checkpoint/stored_tensors.h"

namespace fsdp::checkpoint {

/// Names in the files that start with `from` start with `to` in the state.
struct PrefixRule {
  std::string from;
  std::string to;
};

/// A second name of a tensor, by names of the state. With `name` empty it is only allowed to be in
/// the files; otherwise it also stands in for `name` where the files have only the alias.
struct Alias {
  std::string alias;
  std::string name;
};

struct LoadOptions {
  /// Whether names that are missing, unexpected, or of another shape or type are an error. If not,
  /// what fits is loaded and the report tells the rest.
  bool strict = true;
  /// Whether floating types are converted to that of the state (to nearest even); otherwise every
  /// type must be equal.
  bool convert = true;
  std::vector<PrefixRule> prefixes;  ///< The first that fits a name is applied, once.
  std::vector<Alias> aliases;
  int64_t buffer_bytes = 2 << 20;
};

struct LoadReport {
  std::vector<std::string> missing;     ///< Tensors of the state that no file holds.
  std::vector<std::string> unexpected;  ///< Tensors of the files that the state lacks.
  std::vector<std::string> misshapen;   ///< "name [3] instead of [2]".
  std::vector<std::string> wrong_type;  ///< "name I32 instead of float32".
  int64_t loaded_bytes = 0;             ///< Read from the files by this rank.

  bool clean() const;
  /// A line for each kind of problem, with the first names of each; empty when clean.
  std::string text() const;
};

/// Compares names, shapes and types; reads no data. `*.rotary_emb.inv_freq` of old files is no
/// surprise. The same on every rank. Throws: ModelError when strict and not clean; when prefixes
/// map two names to one; when elements of a tensor are in no file, naming it and the range.
LoadReport compare_state(const StateDict& state, const StoredTensors& stored,
                         const LoadOptions& options = {});

/// compare_state(), then reads this rank's pieces, in the order of the files.
///
/// Not collective: errors of reading differ between ranks, and the caller lets the ranks agree.
/// Memory: buffer_bytes, twice where a type is converted. Cost: one pread for each run of adjacent
/// bytes up to buffer_bytes. Throws: ModelError; what `write` throws.
LoadReport load_state(const StateDict& state, const StoredTensors& stored,
                      const LoadOptions& options = {});

}  // namespace fsdp::checkpoint
