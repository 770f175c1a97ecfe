#include "libfsdp/text/tokenizer_text.h"

#include <algorithm>

namespace fsdp::text {
namespace {

using unicode::Edit;

// Where a stretch that starts at `at` starts in the text before.
size_t map_begin(const std::vector<Edit>& edits, size_t at) {
  // The first edit that ends after `at`; the one before it gives the shift.
  const auto next =
      std::partition_point(edits.begin(), edits.end(), [&](const Edit& e) { return e.end <= at; });
  if (next != edits.end() && next->begin <= at) return next->from_begin;
  return next == edits.begin() ? at : at - std::prev(next)->end + std::prev(next)->from_end;
}

// Where a stretch that ends at `at` ends in the text before.
size_t map_end(const std::vector<Edit>& edits, size_t at) {
  // The first edit that begins at or after `at`; the one before it covers `at` or gives the shift.
  const auto next =
      std::partition_point(edits.begin(), edits.end(), [&](const Edit& e) { return e.begin < at; });
  if (next == edits.begin()) return at;
  const Edit& last = *std::prev(next);
  return at <= last.end ? last.from_end : at - last.end + last.from_end;
}

}  // namespace

Piece TextTrail::rewrite(const Piece& before, std::string now, std::vector<Edit> edits) {
  texts_.push_back({std::move(now), std::move(edits), before.source, before.begin});
  return {texts_.back().text, static_cast<uint32_t>(texts_.size()), 0};
}

ByteSpan TextTrail::origin(const Piece& piece, size_t begin, size_t end) const {
  ByteSpan span{piece.begin + begin, piece.begin + end};
  for (uint32_t source = piece.source; source != 0;) {
    const Rewritten& text = texts_[source - 1];
    const size_t from = map_begin(text.edits, span.begin);
    // An empty stretch, or one that was inserted, has nothing behind it.
    const size_t to = span.begin == span.end ? from : std::max(from, map_end(text.edits, span.end));
    span = {text.parent_begin + from, text.parent_begin + to};
    source = text.parent;
  }
  return span;
}

}  // namespace fsdp::text
