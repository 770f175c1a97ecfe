#include "libfsdp/gloo/rank_signs.h"

#include <cstring>
#include <string_view>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/control/rank_state.h"

namespace fsdp::gloo {

using namespace comm;

namespace {

std::string_view name_of(int32_t unit, const std::vector<std::string>& names) {
  const auto index = static_cast<size_t>(unit);
  return index < names.size() ? std::string_view(names[index]) : std::string_view();
}

std::string phase_of(const SignOfLife& sign) {
  return {sign.phase, strnlen(sign.phase, sizeof(sign.phase))};
}

RankState as_state(int rank, const SignOfLife& sign, const std::vector<std::string>& names) {
  RankState state;
  state.rank = rank;
  state.presence = sign.presence;
  state.step = sign.step;
  state.phase = phase_of(sign);
  if (sign.unit >= 0) state.computes = unit_text(sign.unit, name_of(sign.unit, names));
  state.waits_for = sign.waits_for;
  if (sign.waits_for >= 0)
    state.waits_in = describe_briefly(sign.waits_in, name_of(sign.waits_in.unit, names));
  state.waited_s = sign.waited_s;
  if (sign.begun != 0) state.last = describe_briefly(sign.last, name_of(sign.last.unit, names));
  return state;
}

std::string describe_missing(const SignOfLife& sign, const std::vector<std::string>& names) {
  std::string doing;
  if (sign.step >= 0) doing += cat("step ", sign.step, ", ");
  if (sign.phase[0] != '\0') doing += cat("phase ", phase_of(sign), ", ");
  return doing + (sign.begun == 0 ? "no collective yet"
                                  : cat("its last collective was ",
                                        describe(sign.last, name_of(sign.last.unit, names))));
}

}  // namespace

std::string describe_signs(const std::vector<SignOfLife>& signs,
                           const std::vector<std::string>& unit_names, int member, int rank) {
  std::string text;
  std::string others;
  for (int peer = 0; static_cast<size_t>(peer) < signs.size(); ++peer) {
    const SignOfLife& sign = signs[static_cast<size_t>(peer)];
    if (peer == member) {
      text = cat(" (rank ", member, ": ", describe_missing(sign, unit_names), ")");
    } else if (peer != rank) {
      others += cat("\n  rank ", peer, ": ", describe(as_state(peer, sign, unit_names)));
    }
  }
  if (!others.empty()) text += cat("\n", kStatesTitle, others);
  return text;
}

}  // namespace fsdp::gloo
