// Reads Python pickles as plain data: nothing is ever called, and only names that are allowed may
// appear.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fsdp::io {

/// What a pickle builds, as nodes that refer to each other by index. Lists and dicts may contain
/// themselves: walk along known paths, never without a bound.
class Pickle {
 public:
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInt,
    kFloat,
    kString,
    kBytes,
    kTuple,
    kList,
    kDict,        ///< items: key, value, key, value, ...
    kGlobal,      ///< text: "module name".
    kCall,        ///< items: the global, its arguments (a tuple), and then its state if it has one.
    kPersistent,  ///< items: the identifier.
  };
  using Ref = uint32_t;
  struct Node {
    Kind kind = Kind::kNone;
    int64_t integer = 0;  ///< Of kInt and kBool.
    double number = 0;
    std::string text;
    std::vector<Ref> items;
  };

  /// Protocols 2 to 5. `is_allowed` gets "module name" of each global.
  /// Throws: ModelError for a global that is not allowed, by its name; for opcodes that are not
  /// needed for data; for anything malformed. Memory: linear in `bytes`.
  static Pickle parse(std::span<const std::byte> bytes,
                      const std::function<bool(const std::string&)>& is_allowed);

  const Node& root() const { return nodes_[root_]; }
  const Node& operator[](Ref ref) const { return nodes_[ref]; }

  /// Value of a string key of a dict (or of a called OrderedDict, or an object's state);
  /// nullptr when there is none.
  const Node* find(const Node& dict, std::string_view key) const;
  /// find() that throws ModelError.
  const Node& at(const Node& dict, std::string_view key) const;

  /// Is this a call of that global?
  bool is_call(const Node& node, std::string_view global) const;

  /// Integers of a tuple, a list, or a called torch.Size. Throws: ModelError.
  std::vector<int64_t> integers(const Node& node) const;
  const std::string& string(const Node& node) const;
  int64_t integer(const Node& node) const;
  /// Item i of a tuple, list or call. Throws: ModelError.
  const Node& item(const Node& node, size_t i) const;

 private:
  friend class PickleMachine;
  std::vector<Node> nodes_;
  Ref root_ = 0;
};

}  // namespace fsdp::io
