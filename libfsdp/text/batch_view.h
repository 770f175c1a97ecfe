// Batches for people (text with the loss mask) and for programs (JSON lines).
#pragma once

#include <iosfwd>
#include <span>
#include <string>

#include "libfsdp/text/batch.h"

namespace fsdp::text {

/// The documents of a batch as text, what is learnt in bold green, the rest dim; without `color`
/// what is learnt stands between "[[" and "]]". A line in front of each document says where it is
/// and how many tokens it has.
std::string show_batch(const Batch& batch, const TokenEncoder& encoder, bool color);

/// One object {"input_ids": [...], "labels": [...], "position_ids": [...]} a line for every row, in
/// the order of the set.
void write_sequences(std::ostream& out, std::span<const Sample> samples, std::span<const Row> rows);

}  // namespace fsdp::text
