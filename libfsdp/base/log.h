// One place where the library writes lines for people: stderr, with the rank once it is known.
#pragma once

#include <string_view>

namespace fsdp::log {

enum class Level { kDebug, kInfo, kWarning, kError };

/// Lines below this level are dropped (default kInfo). Thread-safe.
void set_level(Level level);

/// Labels the calling thread's lines "[rank r] "; -1 takes the label away. Each rank thread sets
/// its own.
void set_rank(int rank);

/// Writes one line to stderr in a single write; never throws.
void write(Level level, std::string_view text);

inline void info(std::string_view text) { write(Level::kInfo, text); }
inline void warning(std::string_view text) { write(Level::kWarning, text); }
inline void error(std::string_view text) { write(Level::kError, text); }

}  // namespace fsdp::log
