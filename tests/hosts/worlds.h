// Worlds of world_program, and what they should say.
#pragma once

#include <string>
#include <vector>

#include "tests/support/rank_processes.h"

namespace fsdp::testing {

/// A TCP port of the loopback that was free a moment ago, as is the one above.
int free_port();

/// `world` processes in `mode`, each told that it is alone on its host.
std::vector<ChildProgram> start_hosts(int world, const std::string& mode,
                                      std::vector<std::string> environment = {});

/// The digest of a world of threads, in hexadecimal.
std::string digest_of_threads(int world);

/// Lines "rank r of n digest x" for all ranks, in rank order, that `output` should contain.
std::vector<std::string> digest_lines(int world);

/// Waits until `output` of the child contains `text`; false if it ends or `timeout_s` is over
/// first.
bool wait_for_text(ChildProgram& child, const std::string& text, double timeout_s);

double seconds_now();
bool is_long();  ///< FSDP_TEST_SCALE=long

}  // namespace fsdp::testing
