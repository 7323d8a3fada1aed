// What verify_tokens and verify_rejection share: the round's last step, cutting what a sequence emits.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

// The arguments both ops have. Strides are in elements between rows.
struct VerifyRound {
  const int64_t* draft;  // [batch, drafts]
  int64_t draft_stride;
  const int32_t* num_draft;  // [batch]
  int64_t batch, drafts;
  const int64_t* eos_ids;  // [num_eos]
  int64_t num_eos;
  const int32_t* remaining;  // [batch]
  const bool* finished;      // [batch]
  int64_t* tokens;           // out [batch, drafts + 1]
  int64_t tokens_stride;
  int32_t* num_emitted;   // out [batch]
  int32_t* num_accepted;  // out [batch]
  bool* finished_out;     // out [batch], may be `finished`
};

// How many drafts of the sequence are real.
LK_INLINE int64_t drafts_of(const VerifyRound& a, int64_t row) {
  const int64_t n = a.num_draft[row];
  return n < 0 ? 0 : n < a.drafts ? n : a.drafts;
}

LK_INLINE bool ends_sequence(const VerifyRound& a, int64_t token) {
  for (int64_t i = 0; i < a.num_eos; ++i)
    if (a.eos_ids[i] == token) return true;
  return false;
}

// Emits `accepted` drafts and then `last`, cut after the first EOS and at `remaining`; nothing for a finished sequence.
LK_INLINE void emit(const VerifyRound& a, int64_t row, int64_t accepted, int64_t last) {
  const int64_t* draft = a.draft + row * a.draft_stride;
  int64_t* tokens = a.tokens + row * a.tokens_stride;
  const bool finished = a.finished[row];
  const int64_t remaining = a.remaining[row];
  int64_t limit = accepted + 1 < remaining ? accepted + 1 : remaining;
  if (finished || limit < 0) limit = 0;
  int64_t emitted = 0;
  bool eos = false;
  while (emitted < limit && !eos) {
    const int64_t token = emitted < accepted ? draft[emitted] : last;
    tokens[emitted++] = token;
    eos = ends_sequence(a, token);
  }
  for (int64_t i = emitted; i <= a.drafts; ++i) tokens[i] = -1;
  a.num_emitted[row] = int32_t(emitted);
  a.num_accepted[row] = int32_t(accepted < emitted ? accepted : emitted);
  a.finished_out[row] = finished || eos || emitted >= remaining;
}

}  // namespace lk
