#include "libfsdp/text/dataset.h"

#include <algorithm>

#include "libfsdp/io/jsonl.h"

namespace fsdp::text {
namespace {

Sample make_sample(Encoding encoding) {
  Sample sample{.input_ids = std::move(encoding.ids)};
  sample.labels.assign(sample.input_ids.size(), kIgnoredLabel);
  return sample;
}

/// Labels for every token of which a byte lies in one of `answers`. Both are in order.
void learn_answers(Sample& sample, const std::vector<ByteSpan>& spans,
                   const std::vector<ByteSpan>& answers) {
  size_t answer = 0;
  for (size_t i = 0; i < spans.size(); ++i) {
    while (answer < answers.size() && answers[answer].end <= spans[i].begin) ++answer;
    if (answer == answers.size()) return;
    if (spans[i].end > answers[answer].begin && spans[i].end > spans[i].begin)
      sample.labels[i] = sample.input_ids[i];
  }
}

void learn_from(Sample& sample, size_t begin) {
  std::copy(sample.input_ids.begin() + static_cast<std::ptrdiff_t>(begin), sample.input_ids.end(),
            sample.labels.begin() + static_cast<std::ptrdiff_t>(begin));
}

void add_to(Dataset& dataset, Sample sample, bool was_cut) {
  DatasetReport& report = dataset.report;
  const int64_t trainable = sample.trainable_tokens();
  if (trainable == 0) {
    ++report.dropped;
    return;
  }
  ++report.samples;
  report.truncated += was_cut ? 1 : 0;
  report.tokens += sample.tokens();
  report.trainable_tokens += trainable;
  dataset.samples.push_back(std::move(sample));
}

/// One line; every error names it.
Sample encode_line(const io::Json& json, const SampleEncoder& encoder, const std::string& where) {
  try {
    return encoder.encode(parse_record(json, encoder.has_template()));
  } catch (const DataError& error) {
    throw DataError(cat(where, ": ", error.what()));
  } catch (const jinja::TemplateError& error) {
    throw ModelError(cat(where, ": ", error.what()));
  }
}

void read_file(const std::string& file, const SampleEncoder& encoder, const DatasetOptions& options,
               Dataset& dataset) {
  io::JsonlReader reader(file);
  const int64_t before = dataset.report.records;
  const auto full = [&] {
    return options.max_records > 0 && dataset.report.records >= options.max_records;
  };
  for (io::Json json; !full() && reader.next(json);) {
    ++dataset.report.records;
    Sample sample = encode_line(json, encoder, reader.where());
    const bool was_cut = encoder.truncate(sample);
    add_to(dataset, std::move(sample), was_cut);
  }
  if (dataset.report.records == before && !full())
    throw DataError(cat(file, ": the file has no records"));
}

}  // namespace

int64_t Sample::trainable_tokens() const {
  return std::count_if(labels.begin(), labels.end(),
                       [](int32_t label) { return label != kIgnoredLabel; });
}

SampleEncoder::SampleEncoder(const TokenEncoder& encoder, const DatasetOptions& options)
    : encoder_(encoder), options_(options) {
  if (options.max_seq_length < 2) {
    throw ConfigError(cat("max_seq_length must be at least 2, got ", options.max_seq_length));
  }
  const std::string source = encoder.chat_template();
  if (!source.empty())
    template_ = std::make_unique<const ChatTemplate>(source, encoder.special_tokens());
}

Sample SampleEncoder::encode(const Record& record) const {
  Sample sample = record.kind == Record::Kind::kConversation
                      ? encode_conversation(record.conversation)
                  : record.kind == Record::Kind::kCompletion ? encode_completion(record)
                                                             : encode_text(record.text);
  if (options_.train_on_inputs) learn_from(sample, 0);
  if (!sample.labels.empty()) sample.labels[0] = kIgnoredLabel;
  return sample;
}

Sample SampleEncoder::encode_conversation(const Conversation& conversation) const {
  if (!template_) {
    throw DataError(
        "the record has messages, but the tokenizer has no chat template. Hint: give one, or use "
        "records with "
        "prompt and completion as strings.");
  }
  ChatText chat;
  try {
    chat = template_->render_answers(conversation);
  } catch (const jinja::TemplateError& error) {
    if (error.raised_by_template())
      throw DataError(error.what());  // the messages do not suit the template
    throw;
  }
  Encoding encoding = encoder_.encode(chat.text, false);
  const std::vector<ByteSpan> spans = std::move(encoding.spans);
  Sample sample = make_sample(std::move(encoding));
  learn_answers(sample, spans, chat.answers);
  return sample;
}

Sample SampleEncoder::encode_completion(const Record& record) const {
  Encoding prompt = encoder_.encode(record.prompt, true);
  // An eos that the tokenizer puts behind every text (its bytes are none) ends the answer, not the
  // prompt.
  const auto added_eos = [&] {
    const bool has_no_bytes =
        !prompt.ids.empty() && prompt.spans.back().begin == prompt.spans.back().end;
    return has_no_bytes && prompt.ids.back() == encoder_.eos_id();
  };
  while (added_eos()) {
    prompt.ids.pop_back();
    prompt.spans.pop_back();
  }
  Sample sample = make_sample(std::move(prompt));
  const size_t prompt_tokens = sample.input_ids.size();
  const Encoding answer = encoder_.encode(record.text, false);
  sample.input_ids.insert(sample.input_ids.end(), answer.ids.begin(), answer.ids.end());
  append_eos(sample);
  learn_from(sample, prompt_tokens);
  return sample;
}

Sample SampleEncoder::encode_text(const std::string& text) const {
  Sample sample = make_sample(encoder_.encode(text, true));
  append_eos(sample);
  learn_from(sample, 0);
  return sample;
}

void SampleEncoder::append_eos(Sample& sample) const {
  const std::optional<int32_t> eos = encoder_.eos_id();
  if (eos && (sample.input_ids.empty() || sample.input_ids.back() != *eos))
    sample.input_ids.push_back(*eos);
  sample.labels.resize(sample.input_ids.size(), kIgnoredLabel);
}

bool SampleEncoder::truncate(Sample& sample) const {
  if (sample.tokens() <= options_.max_seq_length) return false;
  sample.input_ids.resize(static_cast<size_t>(options_.max_seq_length));
  sample.labels.resize(static_cast<size_t>(options_.max_seq_length));
  return true;
}

Dataset load_dataset(std::span<const std::string> files, const TokenEncoder& encoder,
                     const DatasetOptions& options) {
  const SampleEncoder sample_encoder(encoder, options);
  Dataset dataset;
  for (const std::string& file : files) read_file(file, sample_encoder, options, dataset);
  if (dataset.samples.empty()) {
    throw DataError(cat(files.empty() ? std::string("data set") : files.front(),
                        ": no token to train on in ", dataset.report.records,
                        " records. Hint: are the answers empty, or is max_seq_length (",
                        options.max_seq_length, ") shorter than the prompts?"));
  }
  return dataset;
}

std::string describe(const DatasetReport& report) {
  return cat(report.records, " records: ", report.samples, " samples, ", report.tokens, " tokens (",
             report.trainable_tokens, " trainable); ", report.truncated, " cut, ", report.dropped,
             " dropped");
}

}  // namespace fsdp::text
