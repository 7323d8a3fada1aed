// Every native CPU op: one argument struct, one entry point per variant, and lk::<op>, which calls the active variant's.
#pragma once

#include "cpu/decoder_stack.h"
#include "cpu/exit_head.h"
#include "cpu/kv_rollback.h"
#include "cpu/quantize.h"
#include "cpu/rms_norm.h"
#include "cpu/rope_append.h"
#include "cpu/small_linear.h"
#include "cpu/swiglu.h"
#include "cpu/verify_attention.h"
#include "cpu/verify_rejection.h"
#include "cpu/verify_tokens.h"

#define LK_CPU_OPS(OP)                      \
  OP(decoder_stack, DecoderStackArgs)       \
  OP(exit_head, ExitHeadArgs)               \
  OP(kv_rollback, KvRollbackArgs)           \
  OP(quantize, QuantizeArgs)                \
  OP(rms_norm, RmsNormArgs)                 \
  OP(rope_append, RopeAppendArgs)           \
  OP(small_linear, SmallLinearArgs)         \
  OP(swiglu, SwigluArgs)                    \
  OP(verify_attention, VerifyAttentionArgs) \
  OP(verify_rejection, VerifyRejectionArgs) \
  OP(verify_tokens, VerifyTokensArgs)

#define LK_DECLARE_OP(name, Args) void name(const Args& args);
#define LK_DECLARE_VARIANT(variant)  \
  namespace lk::variant {            \
  LK_CPU_OPS(LK_DECLARE_OP)          \
  }

namespace lk {
LK_CPU_OPS(LK_DECLARE_OP)
}
LK_DECLARE_VARIANT(scalar)
LK_DECLARE_VARIANT(avx2)
LK_DECLARE_VARIANT(avx512)
LK_DECLARE_VARIANT(avx512_bf16)
LK_DECLARE_VARIANT(avx512_amx)
LK_DECLARE_VARIANT(neon)
LK_DECLARE_VARIANT(neon_bf16)
