#include "libfsdp/trainer/report.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <span>

#include "libfsdp/base/error.h"
#include "libfsdp/io/json.h"

namespace fsdp::trainer {
namespace {

/// Rate per second as speed_metrics rounds it; 0 for a run that took no time.
double rate(double amount, double seconds) {
  return seconds > 0 ? python_round(amount / seconds, 3) : 0;
}

}  // namespace

std::string python_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto scientific =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string text(buffer, scientific.ptr);  // Ends with a zero, which atoi needs.
  const int exponent = std::atoi(text.c_str() + text.find('e') + 1);
  if (exponent < -4 || exponent >= 16) return text;
  const auto fixed =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
  std::string result(buffer, fixed.ptr);
  return result.find('.') == std::string::npos ? result + ".0" : result;
}

double python_round(double value, int digits) {
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), "%.*f", digits, value);
  return std::strtod(buffer, nullptr);
}

std::string python_dict(const std::vector<std::pair<std::string, double>>& entries) {
  std::string text = "{";
  for (const auto& [name, value] : entries) {
    text += cat(text.size() > 1 ? ", " : "", "'", name, "': ", python_repr(value));
  }
  return text + "}";
}

std::string step_line(double mean_loss, const StepRecord& record) {
  return python_dict({{"loss", python_round(mean_loss, 4)},
                      {"grad_norm", record.grad_norm},
                      {"learning_rate", record.learning_rate},
                      {"epoch", python_round(record.epoch, 2)}});
}

std::string eval_line(const EvalRecord& record, bool in_training) {
  std::vector<std::pair<std::string, double>> entries = {
      {"eval_loss", record.eval_loss},
      {"eval_runtime", python_round(record.eval_runtime, 4)},
      {"eval_samples_per_second",
       rate(static_cast<double>(record.eval_samples), record.eval_runtime)}};
  if (in_training) entries.emplace_back("epoch", python_round(record.epoch, 2));
  return python_dict(entries);
}

std::string summary_line(const RunSummary& summary) {
  return python_dict(
      {{"train_runtime", python_round(summary.train_runtime, 4)},
       {"train_samples_per_second",
        rate(static_cast<double>(summary.samples), summary.train_runtime)},
       {"train_steps_per_second", rate(static_cast<double>(summary.steps), summary.train_runtime)},
       {"train_loss", summary.train_loss},
       {"epoch", python_round(summary.epoch, 2)}});
}

namespace {

// A step that was skipped has a norm that is no number, and JSON has none for it.
io::Json number_or_null(double value) {
  return std::isfinite(value) ? io::Json(value) : io::Json(nullptr);
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path) {
  std::error_code ignored;
  std::filesystem::remove(path, ignored);
  file_ = io::File::create(path.string());
}

namespace {

/// The lines of steps up to `step`. The last line may be half a line: its run was killed.
std::string lines_until(const std::filesystem::path& path, int64_t step) {
  std::string kept;
  if (!std::filesystem::exists(path)) return kept;
  const std::string text = io::read_text(path.string());
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;
    const std::string line = text.substr(begin, end + 1 - begin);
    if (io::Json::parse(line, path.string()).get<int64_t>("step") <= step) kept += line;
    begin = end + 1;
  }
  return kept;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, const std::filesystem::path& from,
                         int64_t step) {
  const std::string kept = lines_until(from, step);
  io::write_text_atomic(path.string(), kept);
  file_ = io::File::open_write(path.string());
  end_ = static_cast<int64_t>(kept.size());
}

void MetricsFile::write(const StepRecord& record) {
  write_line(io::Json::object({{"step", record.step},
                               {"epoch", record.epoch},
                               {"loss", number_or_null(record.loss)},
                               {"grad_norm", number_or_null(record.grad_norm)},
                               {"learning_rate", record.learning_rate},
                               {"tokens", record.tokens},
                               {"trainable_tokens", record.trainable_tokens},
                               {"tokens_per_second", record.tokens_per_second},
                               {"step_seconds", record.step_seconds}})
                 .dump());
}

void MetricsFile::write(const EvalRecord& record) {
  write_line(io::Json::object({{"step", record.step},
                               {"epoch", record.epoch},
                               {"eval_loss", record.eval_loss},
                               {"eval_tokens", record.eval_tokens},
                               {"eval_samples", record.eval_samples},
                               {"eval_runtime", record.eval_runtime}})
                 .dump());
}

void MetricsFile::write_line(const std::string& line) {
  const auto text = line + "\n";
  file_.write_at(end_, std::as_bytes(std::span(text)));
  end_ += static_cast<int64_t>(text.size());
}

void write_eval_results(const std::filesystem::path& directory, const EvalRecord& record) {
  std::error_code problem;
  std::filesystem::create_directories(directory, problem);
  if (problem)
    throw HostResourceError(
        cat("[eval] cannot make ", directory.string(), ": ", problem.message(), "."));
  const auto json = io::Json::object({{"eval_loss", record.eval_loss},
                                      {"perplexity", record.perplexity},
                                      {"eval_tokens", record.eval_tokens},
                                      {"eval_samples", record.eval_samples},
                                      {"eval_runtime", record.eval_runtime}});
  io::write_text_atomic((directory / "eval_results.json").string(), json.dump(2) + "\n");
}

}  // namespace fsdp::trainer
