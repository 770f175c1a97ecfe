#include "libfsdp/trainer/data.h"

#include <algorithm>
#include <span>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/digest.h"
#include "libfsdp/text/loader.h"

namespace fsdp::trainer {
namespace {

text::DatasetOptions dataset_options(const DataOptions& options) {
  return {.train_on_inputs = options.sequence.train_on_inputs,
          .max_seq_length = options.sequence.max_seq_length,
          .max_records = options.max_records.value_or(0)};
}

text::LoaderOptions loader_options(const DataOptions& options, const text::TokenEncoder& encoder) {
  return {.rows_per_micro_batch = options.batch_size,
          .packing = options.sequence.packing,
          .max_seq_length = options.sequence.max_seq_length,
          .shuffle = options.shuffle,
          .seed = static_cast<uint64_t>(options.seed),
          .pad_id = encoder.pad_id()};
}

text::Dataset load(const std::filesystem::path& file, const text::TokenEncoder& encoder,
                   const DataOptions& options) {
  const std::vector<std::string> files = {file.string()};
  return text::load_dataset(files, encoder, dataset_options(options));
}

std::vector<int64_t> widened(const std::vector<int32_t>& values) {
  return {values.begin(), values.end()};
}

}  // namespace

struct SequenceData::Impl {
  Impl(const std::filesystem::path& file, std::unique_ptr<text::TokenEncoder> token_encoder,
       const DataOptions& given)
      : encoder(std::move(token_encoder)),
        options(given),
        dataset(load(file, *encoder, given)),
        loader(dataset.samples, loader_options(given, *encoder)) {}

  std::unique_ptr<text::TokenEncoder> encoder;
  DataOptions options;
  text::Dataset dataset;
  text::Loader loader;
  int64_t ordered_epoch = -1;
  std::vector<int64_t> order;
};

SequenceData::SequenceData(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SequenceData::~SequenceData() = default;
SequenceData::SequenceData(SequenceData&&) noexcept = default;
SequenceData& SequenceData::operator=(SequenceData&&) noexcept = default;

SequenceData SequenceData::open(const std::filesystem::path& file, const text::Tokenizer& tokenizer,
                                const DataOptions& options) {
  return SequenceData(std::make_unique<Impl>(file, text::make_token_encoder(tokenizer), options));
}

int64_t SequenceData::samples() const { return impl_->dataset.report.samples; }

int64_t SequenceData::trainable_tokens() const { return impl_->dataset.report.trainable_tokens; }

std::string SequenceData::digest() const {
  checkpoint::Hasher hasher;
  for (const text::Sample& sample : impl_->dataset.samples) {
    const int64_t tokens = sample.tokens();
    hasher.update(std::as_bytes(std::span(&tokens, 1)));
    hasher.update(std::as_bytes(std::span(sample.input_ids)));
    hasher.update(std::as_bytes(std::span(sample.labels)));
  }
  return hasher.digest().hex();
}

std::string SequenceData::summary() const {
  return cat(text::describe(impl_->dataset.report), "; ", impl_->loader.rows().size(),
             " sequences, ", micro_batches(), " micro-batches");
}

int64_t SequenceData::micro_batches() const { return impl_->loader.micro_batches_per_epoch(); }

models::CausalLmBatch SequenceData::micro_batch(int64_t epoch, int64_t m) const {
  if (impl_->ordered_epoch != epoch) {
    impl_->order = impl_->loader.order(epoch);
    impl_->ordered_epoch = epoch;
  }
  const auto batch = impl_->loader.micro_batch(impl_->order, m);
  check(batch.has_value(), "a micro-batch behind the end of the epoch");
  std::vector<models::DocumentSpan> documents;
  for (const auto& document : batch->documents)
    documents.push_back({document.row, document.begin, document.end});
  return models::make_batch(batch->rows, batch->cols, widened(batch->input_ids),
                            widened(batch->labels), widened(batch->position_ids), documents);
}

int64_t SequenceData::sequences_of(int64_t m) const {
  const auto rows = static_cast<int64_t>(impl_->loader.rows().size());
  return std::clamp<int64_t>(rows - m * impl_->options.batch_size, 0, impl_->options.batch_size);
}

}  // namespace fsdp::trainer
