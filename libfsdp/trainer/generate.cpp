#include "libfsdp/trainer/generate.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <optional>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/io/json.h"
#include "libfsdp/models/generate.h"
#include "libfsdp/shard/shell.h"
#include "libfsdp/text/chat.h"
#include "libfsdp/text/dataset_encoder.h"
#include "libfsdp/text/record.h"
#include "libfsdp/trainer/session.h"

namespace fsdp::trainer {
namespace {

using text::jinja::Value;

/// Turns what the user wrote into token ids.
class Prompter {
 public:
  Prompter(const ModelFiles& files, const GenerateOptions& options)
      : files_(files), options_(options) {
    const auto encoder = text::make_token_encoder(files.tokenizer);
    if (!options.raw && !encoder->chat_template().empty()) {
      template_.emplace(encoder->chat_template(), encoder->special_tokens());
    }
    if (!template_ && !options.system.empty()) {
      throw ConfigError(cat("[generate] --system needs a chat template, and ",
                            files.directory.string(), " has none."));
    }
  }

  bool has_template() const { return template_.has_value(); }

  std::vector<int64_t> ids(const std::string& prompt) const {
    if (!template_) return widened(files_.tokenizer.encode(prompt));
    Value::List messages;
    if (!options_.system.empty()) messages.push_back(message("system", options_.system));
    messages.push_back(message("user", prompt));
    return rendered({.messages = Value::sequence(std::move(messages))});
  }

  /// The conversation of a record without its last answer.
  std::vector<int64_t> ids(const text::Record& record) const {
    if (record.kind != text::Record::Kind::kConversation) {
      const auto& text =
          record.kind == text::Record::Kind::kCompletion ? record.prompt : record.text;
      return widened(files_.tokenizer.encode(text));
    }
    if (!template_)
      throw ConfigError("[generate] conversations need a chat template, and the model has none.");
    auto messages = record.conversation.messages.items();
    const auto* role = messages.empty() ? nullptr : messages.back().find("role");
    if (role != nullptr && text::jinja::equal(*role, Value("assistant"))) messages.pop_back();
    return rendered(
        {.messages = Value::sequence(std::move(messages)), .tools = record.conversation.tools});
  }

 private:
  static Value message(std::string_view role, std::string_view content) {
    return Value::mapping({{"role", role}, {"content", content}});
  }
  static std::vector<int64_t> widened(const std::vector<int32_t>& ids) {
    return {ids.begin(), ids.end()};
  }
  std::vector<int64_t> rendered(const text::Conversation& conversation) const {
    return widened(files_.tokenizer.encode(template_->render(conversation, true), false));
  }

  const ModelFiles& files_;
  const GenerateOptions& options_;
  std::optional<text::ChatTemplate> template_;
};

/// What is to be answered: a label for people, and its tokens.
struct Request {
  std::string prompt;
  std::vector<int64_t> ids;
};

std::vector<Request> read_requests(const GenerateOptions& options, const Prompter& prompter) {
  if (options.prompt_file.empty()) return {{options.prompt, prompter.ids(options.prompt)}};
  std::ifstream in(options.prompt_file);
  if (!in) throw DataError(cat("[generate] ", options.prompt_file.string(), " cannot be read."));
  std::vector<Request> requests;
  int64_t number = 0;
  for (std::string line; std::getline(in, line);) {
    const auto where = cat(options.prompt_file.string(), ":", ++number);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      requests.push_back({where, prompter.ids(text::parse_record(io::Json::parse(line, where),
                                                                 prompter.has_template()))});
    } catch (const io::JsonError& error) {
      throw DataError(error.what());
    } catch (const DataError& error) {
      throw DataError(cat(where, ": ", error.what()));
    }
  }
  if (requests.empty())
    throw DataError(cat("[generate] ", options.prompt_file.string(), " has no records."));
  return requests;
}

/// Passes text on and holds back what may become a stop text.
class StopFilter {
 public:
  explicit StopFilter(const std::vector<std::string>& stops) : stops_(stops) {}

  /// The text that is certain to be part of the answer.
  std::string push(const std::string& piece) {
    held_ += piece;
    for (const auto& stop : stops_) {
      const auto at = held_.find(stop);
      if (at == std::string::npos) continue;
      stopped_ = true;
      held_.resize(at);
    }
    return take(stopped_ ? held_.size() : held_.size() - doubtful());
  }
  std::string finish() { return take(held_.size()); }
  bool stopped() const { return stopped_; }

 private:
  /// Length of the longest end of the text that begins a stop text.
  size_t doubtful() const {
    size_t longest = 0;
    for (const auto& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n) {
        if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
      }
    }
    return longest;
  }
  std::string take(size_t count) {
    auto text = held_.substr(0, count);
    held_.erase(0, count);
    return text;
  }

  const std::vector<std::string>& stops_;
  std::string held_;
  bool stopped_ = false;
};

struct Answer {
  std::string text;
  int64_t tokens = 0;
  bool stopped = false;  ///< By a stop token or text, not by max_new_tokens.
};

/// Rank 0's terminal; nothing elsewhere.
void stream(bool visible, const std::string& text) {
  if (!visible || text.empty()) return;
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

class Generator {
 public:
  Generator(const ModelFiles& files, const GenerateOptions& options, ShardedLm& model)
      : files_(files), options_(options), model_(model) {
    picks_ = {.max_new_tokens = options.max_new_tokens,
              .temperature = options.temperature,
              .top_k = options.top_k,
              .top_p = options.top_p,
              .seed = static_cast<uint64_t>(options.seed),
              .stop_ids = {}};
    for (const auto id : files.tokenizer.stop_ids()) picks_.stop_ids.push_back(id);
    // ChatML's end of a turn, which some models' files forget to name.
    if (const auto end = files.tokenizer.id_of("<|im_end|>")) picks_.stop_ids.push_back(*end);
  }

  Answer answer(const std::vector<int64_t>& prompt, bool visible) {
    const at::NoGradGuard no_grad;
    const auto cache = std::make_shared<models::KvCache>(
        files_.config,
        model_.module()->model->prefix_tokens() + static_cast<int64_t>(prompt.size()) +
            picks_.max_new_tokens,
        at::TensorOptions().dtype(to_scalar_type(options_.ranks.param_dtype())));
    const auto forward = [&](const at::Tensor& ids, const std::shared_ptr<models::KvCache>& kept) {
      return model_.run([&](auto& lm) { return lm.forward_cached(ids, kept); });
    };
    Answer answer;
    auto decoder = files_.tokenizer.stream_decoder(true);
    StopFilter filter(options_.stop);
    const auto pass_on = [&](const std::string& piece) {
      answer.text += piece;
      stream(visible, piece);
    };
    models::generate(forward, cache, prompt, picks_, [&](int64_t token) {
      ++answer.tokens;
      answer.stopped =
          std::find(picks_.stop_ids.begin(), picks_.stop_ids.end(), token) != picks_.stop_ids.end();
      if (!answer.stopped) pass_on(filter.push(decoder.push(static_cast<int32_t>(token))));
      return !filter.stopped();
    });
    if (!filter.stopped()) pass_on(filter.push(decoder.finish()));
    pass_on(filter.finish());
    answer.stopped |= filter.stopped();
    return answer;
  }

 private:
  const ModelFiles& files_;
  const GenerateOptions& options_;
  ShardedLm& model_;
  models::GenerateOptions picks_;
};

struct Inputs {
  ModelFiles files;
  std::vector<Request> requests;
};

Inputs open_inputs(const GenerateOptions& options) {
  auto files = open_model(options.model_name_or_path);
  check_base(files, inference_parts(options.adapter_name_or_path, options.quantization), false);
  const Prompter prompter(files, options);
  auto requests = read_requests(options, prompter);
  const int64_t prefix = prefix_tokens(options.adapter_name_or_path);
  for (const auto& request : requests) {
    if (request.ids.empty()) throw DataError("[generate] the prompt has no token.");
    const auto length = prefix + static_cast<int64_t>(request.ids.size()) + options.max_new_tokens;
    files.config.check_context(length);
    if (length > files.config.max_position_embeddings) {
      throw ConfigError(cat("[generate] the prompt has ", request.ids.size(),
                            " tokens; with max_new_tokens ", options.max_new_tokens,
                            " that is more than the model's ", files.config.max_position_embeddings,
                            " positions."));
    }
  }
  return {std::move(files), std::move(requests)};
}

}  // namespace

void check_generate(const GenerateOptions& options) { open_inputs(options); }

void run_generate(const GenerateOptions& options, comm::Communicator& comm) {
  const auto inputs = open_inputs(options);
  auto model = load_sharded(inputs.files, comm, shard_options(options.ranks), Purpose::kInference,
                            inference_parts(options.adapter_name_or_path, options.quantization));
  Generator generator(inputs.files, options, model);
  const bool visible = comm.rank() == 0;
  for (size_t i = 0; i < inputs.requests.size(); ++i) {
    const auto& request = inputs.requests[i];
    if (inputs.requests.size() > 1 && !options.json)
      stream(visible, cat("--- ", request.prompt, "\n"));
    const auto answer = generator.answer(request.ids, visible && !options.json);
    if (!options.json) {
      stream(visible, "\n");
      continue;
    }
    const auto json = io::Json::object({{"prompt", request.prompt},
                                        {"prompt_tokens", request.ids.size()},
                                        {"text", answer.text},
                                        {"tokens", answer.tokens},
                                        {"finish_reason", answer.stopped ? "stop" : "length"}});
    stream(visible, json.dump() + "\n");
  }
}

}  // namespace fsdp::trainer
