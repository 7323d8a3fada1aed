// verify_tokens: the longest prefix of the draft that equals the target's tokens, plus one target token, cut after the
// first EOS and at `remaining` (Leviathan et al., arXiv 2211.17192, for deterministic or coupled draws).
#pragma once

#include <cstdint>

#include "cpu/verify_emit.h"

namespace lk {

struct VerifyTokensArgs {
  VerifyRound round;
  const int64_t* target;  // [batch, drafts + 1]
  int64_t target_stride;
};

}  // namespace lk
