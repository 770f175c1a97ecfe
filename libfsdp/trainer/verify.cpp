#include "libfsdp/trainer/verify.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/verify.h"
#include "libfsdp/io/json.h"

namespace fsdp::trainer {
namespace {

namespace fs = std::filesystem;
using checkpoint::VerifyReport;

/// The checkpoint that `directory` is, or those that are in it, by step.
std::vector<std::string> checkpoints_in(const std::string& directory) {
  if (!fs::is_directory(directory))
    throw ModelError(cat("[verify] ", directory, ": expected a folder"));
  if (checkpoint::name_exists(cat(directory, "/", checkpoint::kManifestFile)) ||
      checkpoint::step_of_name(fs::path(directory).filename().string())) {
    return {directory};
  }
  std::vector<std::pair<int64_t, std::string>> found;
  for (const std::string& name : checkpoint::names_in(directory)) {
    if (const auto step = checkpoint::step_of_name(name))
      found.emplace_back(*step, cat(directory, "/", name));
  }
  if (found.empty()) {
    throw ModelError(cat("[verify] ", directory, ": there is no checkpoint here: neither ",
                         checkpoint::kManifestFile, " nor checkpoint-<step> folders"));
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

std::string size_text(int64_t bytes) {
  char text[32];
  const auto value = static_cast<double>(bytes);
  if (bytes < 1'000'000) {
    std::snprintf(text, sizeof text, "%.1f kB", value / 1e3);
  } else if (bytes < 1'000'000'000) {
    std::snprintf(text, sizeof text, "%.1f MB", value / 1e6);
  } else {
    std::snprintf(text, sizeof text, "%.2f GB", value / 1e9);
  }
  return text;
}

double gigabytes_per_second(const VerifyReport& report) {
  return report.seconds > 0 ? static_cast<double>(report.read_bytes) / report.seconds / 1e9 : 0;
}

void print(const VerifyReport& report) {
  std::printf("%s: %s", report.directory.c_str(), report.whole() ? "whole" : "DAMAGED");
  if (report.step >= 0) {
    std::printf("; step %lld by %lld rank%s, %s, %s; %lld files, %s, %lld digests, %.2f GB/s",
                static_cast<long long>(report.step), static_cast<long long>(report.world_size),
                report.world_size == 1 ? "" : "s", report.strategy.c_str(), report.time.c_str(),
                static_cast<long long>(report.files), size_text(report.bytes).c_str(),
                static_cast<long long>(report.digests), gigabytes_per_second(report));
  }
  std::printf("\n");
  for (const auto& damage : report.damages) std::printf("  %s\n", damage.text().c_str());
  for (const auto& name : report.extra) std::printf("  not part of it: %s\n", name.c_str());
}

io::Json as_json(const VerifyReport& report) {
  io::Json::Array damages;
  for (const auto& one : report.damages) {
    damages.push_back(
        io::Json::object({{"file", one.file}, {"tensor", one.tensor}, {"what", one.what}}));
  }
  return io::Json::object({{"directory", report.directory},
                           {"whole", report.whole()},
                           {"step", report.step},
                           {"world_size", report.world_size},
                           {"strategy", report.strategy},
                           {"time", report.time},
                           {"files", report.files},
                           {"bytes", report.bytes},
                           {"digests", report.digests},
                           {"seconds", report.seconds},
                           {"damages", io::Json(damages)},
                           {"extra", io::Json(report.extra)}});
}

int threads_of(const VerifyOptions& options) {
  if (options.threads > 0) return static_cast<int>(options.threads);
  return static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 16U));
}

}  // namespace

ExitCode run_verify(const VerifyOptions& options) {
  io::Json::Array reports;
  size_t whole = 0;
  for (const std::string& path :
       checkpoints_in(checkpoint::without_end_slash(options.dir.string()))) {
    const VerifyReport report = checkpoint::verify_by_threads(path, threads_of(options));
    if (report.whole()) ++whole;
    reports.push_back(as_json(report));
    if (!options.json) print(report);
  }
  if (options.json) {
    const auto document =
        io::Json::object({{"whole", whole == reports.size()}, {"checkpoints", io::Json(reports)}});
    std::printf("%s\n", document.dump(2).c_str());
  } else {
    std::printf("%zu of %zu whole\n", whole, reports.size());
  }
  if (std::fflush(stdout) != 0) throw HostResourceError("[verify] the output cannot be written.");
  return whole == reports.size() ? ExitCode::kOk : ExitCode::kModel;
}

}  // namespace fsdp::trainer
