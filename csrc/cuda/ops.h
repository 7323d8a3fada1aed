// Every CUDA op: its argument struct and its launcher. Contracts are those of the headers of the same name in csrc/cpu.
// Addresses are the device's, strides are in elements, null stands for an absent tensor. A launcher returns what the
// launch returned, and does not wait.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtypes.h"

namespace lk::cuda {

// Whether kernels that this thread launches may start before the one in front of them has ended (device.cuh). For chains of
// these ops in which nothing writes what a later one takes for weights: those are read ahead. Needs can_overlap().
inline thread_local bool overlap_launches = false;

struct RmsNormArgs {
  const void* x;  // [m, c]
  int64_t x_stride;
  const void* weight;  // [c]
  void* residual;      // [m, c] or null: residual = round(residual + x) first, and that is what is normed
  int64_t residual_stride;
  void* out;  // [m, c], may be x
  int64_t out_stride;
  int64_t m, c;
  float eps;
  DType dtype;  // of all four tensors
};
cudaError_t rms_norm(const RmsNormArgs& args, cudaStream_t stream);

constexpr int kMaxWeights = 4;  // of one launch; more are more launches

struct LinearWeight {
  const void* data;  // [n, c]
  int64_t stride;
  int64_t n;
  const void* bias;  // [n] or null
  void* out;         // [m, n], may be the residual; not x
  int64_t out_stride;
};

struct SmallLinearArgs {
  const void* x;  // [m, c]
  int64_t x_stride;
  int64_t m, c;
  const LinearWeight* weights;  // on the host
  int64_t num_weights;
  const void* norm_weight;  // [c] or null; with m up to kFusedNormRows
  float norm_eps;
  const void* residual;  // [m, n] or null; with a single weight only
  int64_t residual_stride;
  bool swiglu;  // the two weights are gate and up, of equal n: swiglu(gate, up) into the first one's `out`
  DType dtype;  // of every tensor
};
constexpr int64_t kFusedNormRows = 16;  // above, rms_norm in front costs less and gives the same bits
cudaError_t small_linear(const SmallLinearArgs& args, cudaStream_t stream);

// Null tensors switch a filter (or the stream) off.
struct SamplingArgs {
  const float* temperature;  // [n]; 0: the row is greedy. Null: every row is
  const int64_t* seed;       // [n]
  const int64_t* position;   // [n]
  const int64_t* stream;     // [n]
  const int64_t* top_k;      // [n]; 0: off
  const float* top_p;        // [n]; 1: off
  const float* min_p;        // [n]; 0: off
};

struct PenaltyArgs {
  const float* factor;  // [n], above 0. Null: no penalty
  const uint8_t* first_seen;  // [n / share, v]: position from which on a token is seen; 255: never
  int64_t first_seen_stride;
  const uint8_t* position;  // [n], below 255
  int64_t share;            // rows in a row of n that share a row of first_seen
};

struct ExitHeadArgs {
  const void* hidden;  // [n, c]
  int64_t hidden_stride;
  const void* norm_weight;  // [c] or null: hidden is normed; with n up to kFusedNormRows
  float eps;
  const void* lm_head;  // [v, c]
  int64_t lm_head_stride;
  const void* bias;  // [v] or null
  float logit_scale;
  float softcap;  // 0: no cap
  PenaltyArgs penalty;
  SamplingArgs sampling;
  float* logits;  // [n, v], needed with a filter; null: not kept
  int64_t logits_stride;
  bool keep_logits;    // of every row, not only of filtered ones
  void* partials;      // scratch of n * ceil(v / kTileRows) * kPartialBytes bytes
  int64_t* token;      // out [n]
  float* logprob;      // out [n]
  float* confidence;   // out [n]
  int64_t n, c, v;
  DType dtype;  // of hidden, norm_weight, lm_head, bias
};
constexpr int kTileRows = 16;  // tokens of the vocabulary that share a partial result
constexpr int kPartialBytes = 24;
cudaError_t exit_head(const ExitHeadArgs& args, cudaStream_t stream);

struct SwigluArgs {
  const void* gate;  // [m, n]
  int64_t gate_stride;
  const void* up;  // [m, n]
  int64_t up_stride;
  void* out;  // [m, n], may be gate or up
  int64_t out_stride;
  int64_t m, n;
  DType dtype;  // of all three
};
cudaError_t swiglu(const SwigluArgs& args, cudaStream_t stream);

struct RopeAppendArgs {
  void* q;  // [b, t, h, d], strides of the first three dimensions; same below
  int64_t q_stride[3];
  const void* k;  // [b, t, g, d]
  int64_t k_stride[3];
  const void* v;  // [b, t, g, d]
  int64_t v_stride[3];
  void* k_cache;  // [slots, g, s, d]
  int64_t k_cache_stride[3];
  void* v_cache;
  int64_t v_cache_stride[3];
  const int32_t* lengths;    // [b]
  const int32_t* positions;  // [b, t]
  int64_t positions_stride;
  const float* inv_freq;  // [b, t, d/2]; strides 0 for one vector
  int64_t inv_freq_stride[2];
  float attention_factor;
  const int32_t* slot_ids;     // [b] or null: row i in slot i
  const int32_t* num_queries;  // [b] or null: t
  int64_t b, t, h, g, d;
  DType dtype;  // of q, k, v and the caches
};
cudaError_t rope_append(const RopeAppendArgs& args, cudaStream_t stream);

struct VerifyAttentionArgs {
  const void* q;  // [b, t, h, d], strides of the first three dimensions; same below
  int64_t q_stride[3];
  const void* k_cache;  // [slots, g, s, d]
  int64_t k_cache_stride[3];
  const void* v_cache;
  int64_t v_cache_stride[3];
  void* out;  // [b, t, h, d]
  int64_t out_stride[3];
  const int32_t* lengths;      // [b]
  const int32_t* slot_ids;     // [b] or null: row i in slot i
  const int32_t* num_queries;  // [b] or null: t
  const bool* tree_mask;       // [t, t] or null
  int64_t tree_mask_stride;
  int64_t sliding_window;  // 0: none
  float scale;
  int64_t b, t, h, g, d, capacity;  // capacity: s
  DType dtype;                      // of q, the caches and out
  float* scratch;                   // verify_attention_scratch() bytes
};
constexpr int kMinChunk = 64;  // positions of the cache whose results are merged, at least
int64_t verify_attention_scratch(int64_t b, int64_t t, int64_t h, int64_t g, int64_t d, int64_t capacity);
cudaError_t verify_attention(const VerifyAttentionArgs& args, cudaStream_t stream);

struct KvRollbackArgs {
  void* k_cache;  // [layers, slots, g, s, d], strides of the first four dimensions
  int64_t k_cache_stride[4];
  void* v_cache;
  int64_t v_cache_stride[4];
  int32_t* lengths;         // [b]
  const int32_t* keep;      // [b]
  const int32_t* slot_ids;  // [b] or null: row i in slot i
  const int32_t* path;      // [b, window] or null: the identity
  int64_t path_stride;
  int64_t window;
  bool scrub;
  int64_t layers, b, g, d;
  DType dtype;
};
constexpr int64_t kRollbackMaxWindow = 8192;  // with a path
cudaError_t kv_rollback(const KvRollbackArgs& args, cudaStream_t stream);

// What verify_tokens and verify_rejection share.
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

struct VerifyTokensArgs {
  VerifyRound round;
  const int64_t* target;  // [batch, drafts + 1]
  int64_t target_stride;
};
cudaError_t verify_tokens(const VerifyTokensArgs& args, cudaStream_t stream);

struct VerifyRejectionArgs {
  VerifyRound round;
  const float* draft_probs;  // [batch, drafts, vocab]
  int64_t draft_probs_stride[2];
  const float* target_probs;  // [batch, drafts + 1, vocab]
  int64_t target_probs_stride[2];
  const float* uniforms;  // [batch, drafts + 1, 2]: acceptance, next token
  int64_t uniforms_stride[2];
  int64_t vocab;
  bool block;
};
cudaError_t verify_rejection(const VerifyRejectionArgs& args, cudaStream_t stream);

// Of a round of decoding, see layerskip_kernels/decode/glue.py.
struct EmbedArgs {
  const int64_t* tokens;  // [n]
  int64_t tokens_stride;
  const void* table;  // [v, c]
  int64_t table_stride;
  void* out;  // [n, c]
  int64_t out_stride;
  int64_t n, c;
  DType dtype;  // of table and out
};
cudaError_t embed(const EmbedArgs& args, cudaStream_t stream);

constexpr int kMaxRepeated = 8;

struct RepeatedField {
  const void* from;  // [b]
  void* to;          // [b, t]
  int64_t itemsize;  // 4 or 8
};

struct BeginRoundArgs {
  const int64_t* pending;    // [b]
  const int32_t* lengths;    // [b]
  const int32_t* remaining;  // [b]
  int64_t* tokens;           // out [b, t], the first column
  int32_t* positions;        // out [b, t]
  int32_t* step_lengths;     // out [t, b]
  int32_t* num_draft;        // out [b]
  int64_t* next_positions;   // out [b, t] or null
  RepeatedField repeated[kMaxRepeated];
  int num_repeated;
  int64_t b, t;
};
cudaError_t begin_round(const BeginRoundArgs& args, cudaStream_t stream);

struct EndRoundArgs {
  const int64_t* emitted;      // [b, t]
  const int32_t* num_emitted;  // [b]
  int32_t* remaining;          // [b]
  int64_t* pending;            // out [b]
  int64_t b, t;
};
cudaError_t end_round(const EndRoundArgs& args, cudaStream_t stream);

}  // namespace lk::cuda
