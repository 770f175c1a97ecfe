#include "libfsdp/checkpoint/llama_pth.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include "libfsdp/base/checked.h"
#include "libfsdp/checkpoint/torch_files.h"
#include "libfsdp/io/json.h"

namespace fsdp::checkpoint {
namespace {

namespace fs = std::filesystem;
using io::Json;

/// How the files share a tensor.
enum class Split : uint8_t { kRows, kColumns, kByShape, kNone };

struct NameRule {
  std::string_view theirs;
  std::string_view ours;
  Split split;
};
constexpr std::array<NameRule, 9> kLayerRules = {
    {{"attention.wq.weight", "self_attn.q_proj.weight", Split::kRows},
     {"attention.wk.weight", "self_attn.k_proj.weight", Split::kRows},
     {"attention.wv.weight", "self_attn.v_proj.weight", Split::kRows},
     {"attention.wo.weight", "self_attn.o_proj.weight", Split::kColumns},
     {"feed_forward.w1.weight", "mlp.gate_proj.weight", Split::kRows},
     {"feed_forward.w2.weight", "mlp.down_proj.weight", Split::kColumns},
     {"feed_forward.w3.weight", "mlp.up_proj.weight", Split::kRows},
     {"attention_norm.weight", "input_layernorm.weight", Split::kNone},
     {"ffn_norm.weight", "post_attention_layernorm.weight", Split::kNone}}};
constexpr std::array<NameRule, 3> kRules = {
    {{"tok_embeddings.weight", "model.embed_tokens.weight", Split::kByShape},
     {"output.weight", "lm_head.weight", Split::kRows},
     {"norm.weight", "model.norm.weight", Split::kNone}}};

struct Mapped {
  std::string name;
  Split split;
};

/// Empty for tensors that Hugging Face's model computes itself.
std::optional<Mapped> map_name(const std::string& name, const std::string& where) {
  if (name.ends_with("rope.freqs")) return std::nullopt;
  for (const NameRule& rule : kRules) {
    if (name == rule.theirs) return Mapped{std::string(rule.ours), rule.split};
  }
  constexpr std::string_view kPrefix = "layers.";
  const size_t dot = name.find('.', kPrefix.size());
  if (name.starts_with(kPrefix) && dot != std::string::npos) {
    const std::string number = name.substr(kPrefix.size(), dot - kPrefix.size());
    for (const NameRule& rule : kLayerRules) {
      if (std::string_view(name).substr(dot + 1) == rule.theirs)
        return Mapped{cat("model.layers.", number, ".", rule.ours), rule.split};
    }
  }
  throw ModelError(cat(where, ": '", name, "' is no tensor of a Llama model"));
}

std::vector<std::string> files_of(const std::string& directory) {
  std::vector<std::string> files;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("consolidated.") && name.ends_with(".pth"))
      files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

/// Part f of n goes behind the parts before it, along one dim.
void place_part(FoundTensor& part, Split split, size_t f, size_t n, int64_t dim) {
  if (split == Split::kNone || n == 1) return;
  if (part.shape.size() != 2)
    throw ModelError(cat("'", part.name, "' has ", part.shape.size(), " dims, expected 2"));
  size_t along = split == Split::kColumns ? 1 : 0;
  // Llama 1 and 2 cut the embedding by columns, Llama 3 by rows.
  if (split == Split::kByShape && part.shape[1] != dim) along = 1;
  part.offsets[along] =
      checked_mul<ModelError>(static_cast<int64_t>(f), part.shape[along], part.name);
  part.whole_shape[along] =
      checked_mul<ModelError>(static_cast<int64_t>(n), part.shape[along], part.name);
}

/// All files' tensors as parts of Hugging Face's.
FoundTensors find_all(const std::vector<std::string>& paths, int64_t dim) {
  FoundTensors all;
  for (size_t f = 0; f < paths.size(); ++f) {
    FoundTensors found = find_in_pth(paths[f]);
    for (FoundTensor& tensor : found.tensors) {
      const auto mapped = map_name(tensor.name, paths[f]);
      if (!mapped || (mapped->split == Split::kNone && f > 0)) continue;
      tensor.name = mapped->name;
      tensor.file = f;
      place_part(tensor, mapped->split, f, paths.size(), dim);
      all.tensors.push_back(std::move(tensor));
    }
    all.files.push_back(paths[f]);
  }
  return all;
}

const std::vector<int64_t>& matrix_shape(const StoredTensors& stored, const std::string& name) {
  const StoredTensor* tensor = stored.find(name);
  if (tensor == nullptr || tensor->shape.size() != 2)
    throw ModelError(cat(stored.directory(), ": there is no matrix '", name, "'"));
  return tensor->shape;
}

int64_t default_positions(const Json& params, double theta) {
  if (params.get<bool>("use_scaled_rope", false)) return 131072;  // Llama 3.1 and later.
  if (theta == 500000.0) return 8192;                             // Llama 3.
  if (theta == 1000000.0) return 16384;                           // Code Llama.
  return 4096;
}

/// config.json of the model. Sizes that params.json does not say are read off the tensors.
io::HfModelConfig config_of(const Json& params, const StoredTensors& stored,
                            const std::string& where) {
  const auto& embedding = matrix_shape(stored, "model.embed_tokens.weight");
  const auto heads = params.get<int64_t>("n_heads");
  const auto theta = params.get<double>("rope_theta", 10000.0);
  const bool is_llama3 = embedding[0] == 128256;
  Json config = Json::object(
      {{"architectures", Json::array({"LlamaForCausalLM"})},
       {"model_type", "llama"},
       {"attention_bias", false},
       {"bos_token_id", is_llama3 ? 128000 : 1},
       {"eos_token_id", is_llama3 ? 128001 : 2},
       {"hidden_act", "silu"},
       {"hidden_size", embedding[1]},
       {"initializer_range", 0.02},
       {"intermediate_size", matrix_shape(stored, "model.layers.0.mlp.gate_proj.weight")[0]},
       {"max_position_embeddings", default_positions(params, theta)},
       {"num_attention_heads", heads},
       {"num_hidden_layers", params.get<int64_t>("n_layers")},
       {"num_key_value_heads", params.get<int64_t>("n_kv_heads", heads)},
       {"rms_norm_eps", params.get<double>("norm_eps", 1e-5)},
       {"rope_theta", theta},
       {"tie_word_embeddings", stored.find("lm_head.weight") == nullptr},
       {"vocab_size", embedding[0]}});
  if (params.get<bool>("use_scaled_rope", false)) {
    config["rope_scaling"] =
        Json::object({{"rope_type", "llama3"},
                      {"factor", params.get<double>("rope_scaling_factor", 8.0)},
                      {"low_freq_factor", 1.0},
                      {"high_freq_factor", 4.0},
                      {"original_max_position_embeddings", 8192}});
  }
  return io::HfModelConfig::from_json(config, where);
}

/// Rows of q_proj and k_proj: theirs are the pairs (2 i, 2 i + 1) of a head that are rotated
/// together, Hugging Face's are the first elements of all pairs, then the second ones.
void reorder_rows(TensorPart& part, int64_t head_dim) {
  const auto row_bytes = static_cast<int64_t>(dtype_bytes(part.dtype)) * part.shape[1];
  const auto read = part.read;
  const int64_t columns = part.shape[1], width = row_bytes / columns;
  part.read = [=](int64_t offset, std::span<std::byte> to) {
    while (!to.empty()) {
      const int64_t row = offset / columns, at = offset % columns;
      const int64_t within = row % head_dim, half = head_dim / 2;
      const int64_t source = row - within + 2 * (within % half) + within / half;
      const int64_t numel = std::min(columns - at, static_cast<int64_t>(to.size()) / width);
      const auto bytes = static_cast<size_t>(numel * width);
      read(source * columns + at, to.first(bytes));
      to = to.subspan(bytes);
      offset += numel;
    }
  };
}

/// Exactly the tensors of the configuration, in its order.
void check_tensors(const io::HfModelConfig& config, const StateDict& state,
                   const std::string& directory) {
  std::map<std::string, std::vector<int64_t>> left;
  for (const TensorPart& part : state.tensors) left[part.name] = part.shape;
  for (const io::NamedShape& tensor : config.expected_tensors()) {
    const auto found = left.find(tensor.name);
    if (found == left.end() || found->second != tensor.shape)
      throw ModelError(cat(directory, ": '", tensor.name, "' is ",
                           found == left.end() ? "missing" : io::shape_text(found->second),
                           ", expected ", io::shape_text(tensor.shape),
                           ". Hint: are all parts consolidated.NN.pth there?"));
    left.erase(found);
  }
  if (!left.empty())
    throw ModelError(cat(directory, ": '", left.begin()->first,
                         "' is not part of the model that params.json describes"));
}

}  // namespace

bool is_llama_pth(const std::string& directory) { return !files_of(directory).empty(); }

LlamaPth open_llama_pth(const std::string& directory) {
  const std::string params_path = (fs::path(directory) / "params.json").string();
  const Json params = Json::read(params_path);
  const std::vector<std::string> files = files_of(directory);
  const auto found = find_all(files, params.get<int64_t>("dim"));
  auto reader = std::make_shared<StoredReader>(as_stored(found, directory));
  LlamaPth model{.config = config_of(params, reader->stored(), params_path)};
  std::vector<std::string> order;
  for (const io::NamedShape& tensor : model.config.expected_tensors()) order.push_back(tensor.name);
  model.state = stored_state(reader, order);
  check_tensors(model.config, model.state, directory);
  for (TensorPart& part : model.state.tensors) {
    if (part.name.ends_with("self_attn.q_proj.weight") ||
        part.name.ends_with("self_attn.k_proj.weight"))
      reorder_rows(part, model.config.head_dim);
  }
  return model;
}

}  // namespace fsdp::checkpoint
