#include "libfsdp/lora/peft_files.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/model_save.h"
#include "libfsdp/checkpoint/verdict.h"
#include "libfsdp/lora/parameter_names.h"
#include "libfsdp/shard/state_dict.h"

namespace fsdp::lora {
namespace {

constexpr const char* kStem = "adapter_model";
constexpr const char* kConfigFile = "adapter_config.json";

// Bytes of a piece, a part at a time.
template <class Use>
void for_each_part(const checkpoint::TensorPart& tensor, Use use) {
  constexpr int64_t kNumel = int64_t{1} << 18;
  std::vector<std::byte> bytes;
  for (int64_t at = 0; at < tensor.numel; at += kNumel) {
    const int64_t count = std::min(kNumel, tensor.numel - at);
    bytes.resize(static_cast<size_t>(count) * dtype_bytes(tensor.dtype));
    tensor.read(at, bytes);
    use(bytes);
  }
}

// An adapter of an Embedding starts with A zero, others with B. A prefix starts so where PEFT is
// told to (init_weights).
bool starts_at_zero(const std::string& peft_name) {
  for (const char* end :
       {".lora_B.weight", ".lora_embedding_A", ".adaption_gate", "prompt_embeddings"})
    if (peft_name.ends_with(end)) return true;
  return false;
}

// Throws for the first tensor that is zero on all ranks.
void check_updated(ShardedCore& core, const checkpoint::StateDict& state, const char* what) {
  std::vector<uint8_t> mine(state.tensors.size(), 0);
  for (size_t i = 0; i < mine.size(); ++i) {
    const checkpoint::TensorPart& tensor = state.tensors[i];
    if (tensor.shape.empty() ||
        std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end())
      throw ModelError(cat(what, ": '", tensor.name, "' has no element"));
    for_each_part(tensor, [&](const std::vector<std::byte>& bytes) {
      for (const std::byte byte : bytes) mine[i] |= static_cast<uint8_t>(byte);
    });
  }
  comm::Communicator& comm = core.comm();
  std::vector<uint8_t> all(mine.size() * static_cast<size_t>(comm.size()));
  comm.exchange(mine.data(), mine.size(), all.data(), comm::make_tag("adapter is trained"));
  for (size_t i = 0; i < mine.size(); ++i) {
    if (!starts_at_zero(state.tensors[i].name)) continue;
    bool any = false;
    for (size_t rank = 0; rank < static_cast<size_t>(comm.size()); ++rank)
      any = any || all[rank * mine.size() + i] != 0;
    if (any) continue;
    throw ModelError(cat(what, ": '", state.tensors[i].name,
                         "' is all zero: the adapter has never been updated"));
  }
}

void save_files(ShardedCore& core, const checkpoint::StateDict& state,
                const std::string& config_text, const std::string& directory) {
  check_updated(core, state, "adapter");
  checkpoint::save_model(core.comm(), directory, state,
                         {.stem = kStem, .max_file_bytes = std::numeric_limits<int64_t>::max()},
                         {{kConfigFile, config_text}});
}

// "lm_head.weight" -> "lm_head.base_layer.weight": in PEFT's files a layer that has an adapter lies
// within another.
std::string within_adapted(const std::string& parameter) {
  const size_t dot = parameter.rfind('.');
  return cat(parameter.substr(0, dot), ".base_layer", parameter.substr(dot));
}

// Loads the files. PEFT saves an embedding or a head that has an adapter whole, beside it; the
// adapter is right for no other one, and is saved by us without it, so it must be the model's.
void load_tensors(ShardedCore& core, checkpoint::StateDict state, const std::string& directory) {
  const auto stored = checkpoint::StoredTensors::open(directory, kStem);
  std::set<std::string> expected, others;
  for (const checkpoint::TensorPart& tensor : state.tensors) expected.insert(tensor.name);
  for (checkpoint::TensorPart& tensor : model_state(core).tensors) {
    if (tensor.name.find('.') == std::string::npos) continue;
    const std::string model_name = tensor.name;
    tensor.name = peft_name(within_adapted(model_name), kDefaultName);
    if (expected.count(tensor.name) != 0 || !stored.find(tensor.name)) continue;
    tensor.target = {};
    tensor.write = [&others, model_name, read = tensor.read](int64_t at,
                                                             std::span<const std::byte> theirs) {
      std::vector<std::byte> ours(theirs.size());
      read(at, ours);
      if (!std::equal(ours.begin(), ours.end(), theirs.begin())) others.insert(model_name);
    };
    state.tensors.push_back(std::move(tensor));
  }
  checkpoint::load_state(state, stored);
  if (others.empty()) return;
  throw ModelError(cat(directory, ": the adapter was trained on another '", *others.begin(),
                       "' than the model's; it holds its own. Hint: name the model that it was "
                       "trained on, or merge, which takes the adapter's."));
}

void load_files(ShardedCore& core, const checkpoint::StateDict& state,
                const std::string& directory) {
  const checkpoint::Verdict verdict(core.comm());
  checkpoint::Outcome loaded;
  loaded.run([&] { load_tensors(core, state, directory); });
  verdict.agree(loaded, "adapter is loaded");
  core.publish();
  check_updated(core, state, directory.c_str());
}

}  // namespace

checkpoint::StateDict renamed_state(ShardedCore& core,
                                    const std::map<std::string, std::string>& names) {
  checkpoint::StateDict state;
  for (checkpoint::TensorPart& tensor : model_state(core).tensors) {
    const auto name = names.find(tensor.name);
    if (name == names.end()) continue;
    tensor.name = name->second;
    state.tensors.push_back(std::move(tensor));
  }
  return state;
}

checkpoint::StateDict adapter_state(ShardedCore& core, const Adapters& adapters,
                                    const std::string& name) {
  std::map<std::string, std::string> names;
  const auto add = [&](const std::string& parameter) {
    names[parameter] = peft_name(parameter, name);
  };
  for (const AdapterParameters& adapter : adapters.parameters(name)) {
    add(a_name(adapter, name));
    add(b_name(adapter, name));
    if (adapter.magnitude.defined()) add(magnitude_name(adapter, name));
  }
  for (const std::string& parameter : adapters.trained_besides()) {
    const bool within = adapters.adapts(parameter.substr(0, parameter.rfind('.')));
    names[parameter] = peft_name(within ? within_adapted(parameter) : parameter, name);
  }
  return renamed_state(core, names);
}

void save_adapter(ShardedCore& core, const Tuner& tuner, const std::string& directory) {
  save_files(core, tuner.files(core), tuner.config_text(), directory);
}

void save_adapter(ShardedCore& core, const Adapters& adapters, const std::string& directory,
                  const std::string& name) {
  save_files(core, adapter_state(core, adapters, name), adapter_config_text(adapters.config(name)),
             directory);
}

void load_adapter(ShardedCore& core, const Tuner& tuner, const std::string& directory) {
  load_files(core, tuner.files(core), directory);
}

void load_adapter(ShardedCore& core, const Adapters& adapters, const std::string& directory,
                  const std::string& name) {
  load_files(core, adapter_state(core, adapters, name), directory);
}

}  // namespace fsdp::lora
