#include "cpu/ops.h"
#include "cpu/variant.h"

namespace lk::LK_VARIANT {

void verify_tokens(const VerifyTokensArgs& args) {
  const VerifyRound& round = args.round;
  for (int64_t row = 0; row < round.batch; ++row) {
    const int64_t* draft = round.draft + row * round.draft_stride;
    const int64_t* target = args.target + row * args.target_stride;
    const int64_t drafts = drafts_of(round, row);
    int64_t accepted = 0;
    while (accepted < drafts && draft[accepted] == target[accepted]) ++accepted;
    emit(round, row, accepted, target[accepted]);
  }
}

}  // namespace lk::LK_VARIANT
