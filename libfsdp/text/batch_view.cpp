#include "libfsdp/text/batch_view.h"

#include <ostream>
#include <string_view>

namespace fsdp::text {
namespace {

constexpr std::string_view kLearnt = "\x1b[1;32m";
constexpr std::string_view kGiven = "\x1b[2m";
constexpr std::string_view kReset = "\x1b[0m";

/// Calls visit(ids, learnt) for each longest run of tokens that are all learnt, or all not.
template <class Visit>
void for_each_run(std::span<const int32_t> ids, std::span<const int32_t> labels, Visit&& visit) {
  for (size_t begin = 0; begin < ids.size();) {
    const bool learnt = labels[begin] != kIgnoredLabel;
    size_t end = begin + 1;
    while (end < ids.size() && (labels[end] != kIgnoredLabel) == learnt) ++end;
    visit(ids.subspan(begin, end - begin), learnt);
    begin = end;
  }
}

std::string show_document(std::span<const int32_t> ids, std::span<const int32_t> labels,
                          const TokenEncoder& encoder, bool color) {
  std::string out;
  for_each_run(ids, labels, [&](std::span<const int32_t> run, bool learnt) {
    const std::string text = encoder.decode(run);
    if (color) {
      out += cat(learnt ? kLearnt : kGiven, text, kReset);
    } else {
      out += learnt ? cat("[[", text, "]]") : text;
    }
  });
  return out;
}

void write_list(std::ostream& out, std::string_view name, std::span<const int32_t> values) {
  out << '"' << name << "\": [";
  for (size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "" : ", ") << values[i];
  out << ']';
}

}  // namespace

std::string show_batch(const Batch& batch, const TokenEncoder& encoder, bool color) {
  std::string out;
  for (const DocumentRange& document : batch.documents) {
    const auto at = static_cast<size_t>(document.row * batch.cols + document.begin);
    const auto size = static_cast<size_t>(document.end - document.begin);
    const auto ids = std::span(batch.input_ids).subspan(at, size);
    const auto labels = std::span(batch.labels).subspan(at, size);
    int64_t learnt = 0;
    for (const int32_t label : labels) learnt += label != kIgnoredLabel ? 1 : 0;
    out += cat("--- row ", document.row, ", columns ", document.begin, " to ", document.end - 1,
               ": ", size, " tokens, ", learnt, " trained on\n",
               show_document(ids, labels, encoder, color), "\n");
  }
  return out;
}

void write_sequences(std::ostream& out, std::span<const Sample> samples,
                     std::span<const Row> rows) {
  for (const Row& row : rows) {
    const Batch batch = make_batch(samples, std::span(&row, 1), 0);
    out << '{';
    write_list(out, "input_ids", batch.input_ids);
    out << ", ";
    write_list(out, "labels", batch.labels);
    out << ", ";
    write_list(out, "position_ids", batch.position_ids);
    out << "}\n";
  }
}

}  // namespace fsdp::text
