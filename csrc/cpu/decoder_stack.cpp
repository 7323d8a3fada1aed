#include "cpu/ops.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

// Scratch of one call, carved out of one workspace: q, k, v, attended [rows, ...], gate, up [rows, ...], cos and sin.
struct Scratch {
  char *q, *k, *v, *attended, *gate, *up, *hidden;
  float *rope, *no_rope, *zero_frequencies;
};

LK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Stack {
  const DecoderStackArgs& a;
  int64_t rows, size;       // of the window flattened; bytes of an element
  char* hidden;             // [rows, c]
  int64_t hidden_stride;
  Scratch scratch;

  void carve(bool copy_hidden);
  void fill_tables() const;
  RopeAppendArgs rope_args(const StackLayer& layer, int64_t index) const;
  void norm_heads(char* x, const void* weight, int64_t heads) const;
  void linear(const void* x, int64_t x_stride, int64_t c, const LinearWeight* weights, int64_t count, const void* norm,
              bool residual) const;
  void attend(const StackLayer& layer, int64_t index) const;
  void feed_forward(const StackLayer& layer) const;
  void copy_hidden(bool back) const;
};

LK_INLINE LinearWeight weight_of(const StackLinear& w, void* out, int64_t out_stride) {
  return {w.data, w.stride, w.n, w.bias, out, out_stride, w.quantization};
}
LK_INLINE LinearWeight weight_of(const StackLinear& w, void* out) { return weight_of(w, out, w.n); }

void Stack::carve(bool copy_hidden) {
  int64_t inner = 0, mlp = 0;
  bool some_rope = false, some_not = false;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    inner = most(inner, a.layers[i].q.n);
    mlp = most(mlp, a.layers[i].gate.n);
    (a.layers[i].use_rope ? some_rope : some_not) = true;
  }
  const int64_t table = rows * a.d * int64_t(sizeof(float));
  const int64_t bytes[] = {rows * inner * size, rows * a.g * a.d * size, rows * a.g * a.d * size, rows * inner * size,
                           rows * mlp * size,   rows * mlp * size,       copy_hidden ? rows * a.c * size : 0,
                           some_rope ? table : 0, some_not ? table : 0,  some_not ? a.d / 2 * int64_t(sizeof(float)) : 0};
  constexpr int kParts = sizeof(bytes) / sizeof(bytes[0]);
  int64_t offset[kParts + 1] = {0};
  for (int i = 0; i < kParts; ++i) offset[i + 1] = offset[i] + (bytes[i] + 63) / 64 * 64;
  char* base = static_cast<char*>(workspace(Workspace::decoder_stack, size_t(offset[kParts])));
  char* part[kParts];
  for (int i = 0; i < kParts; ++i) part[i] = bytes[i] ? base + offset[i] : nullptr;
  scratch = {part[0], part[1], part[2], part[3], part[4], part[5], part[6], reinterpret_cast<float*>(part[7]),
             reinterpret_cast<float*>(part[8]), reinterpret_cast<float*>(part[9])};
}

// cos and sin once for all layers; those of zero frequencies for layers that do not rotate.
void Stack::fill_tables() const {
  RopeAppendArgs args = rope_args(a.layers[0], 0);
  if (scratch.rope) {
    args.inv_freq = a.inv_freq;
    args.inv_freq_stride[0] = a.inv_freq_stride[0];
    args.inv_freq_stride[1] = a.inv_freq_stride[1];
    args.attention_factor = a.attention_factor;
    rope_table(args, scratch.rope);
  }
  if (scratch.no_rope) {
    memset(scratch.zero_frequencies, 0, size_t(a.d / 2) * sizeof(float));
    args.inv_freq = scratch.zero_frequencies;
    args.inv_freq_stride[0] = args.inv_freq_stride[1] = 0;
    args.attention_factor = 1;
    rope_table(args, scratch.no_rope);
  }
}

RopeAppendArgs Stack::rope_args(const StackLayer& layer, int64_t index) const {
  RopeAppendArgs args{};
  args.q = scratch.q;
  args.k = scratch.k;
  args.v = scratch.v;
  int64_t* strides[] = {args.q_stride, args.k_stride, args.v_stride};
  const int64_t widths[] = {layer.q.n, layer.k.n, layer.v.n};
  for (int i = 0; i < 3; ++i) {
    strides[i][0] = a.t * widths[i];
    strides[i][1] = widths[i];
    strides[i][2] = a.d;
  }
  args.k_cache = static_cast<char*>(a.k_cache) + index * a.k_cache_stride[0] * size;
  args.v_cache = static_cast<char*>(a.v_cache) + index * a.v_cache_stride[0] * size;
  for (int i = 0; i < 3; ++i) {
    args.k_cache_stride[i] = a.k_cache_stride[i + 1];
    args.v_cache_stride[i] = a.v_cache_stride[i + 1];
  }
  args.lengths = a.lengths;
  args.positions = a.positions;
  args.positions_stride = a.positions_stride;
  args.slot_ids = a.slot_ids;
  args.num_queries = a.num_queries;
  args.table = layer.use_rope ? scratch.rope : scratch.no_rope;
  args.b = a.b, args.t = a.t, args.h = layer.q.n / a.d, args.g = a.g, args.d = a.d;
  args.dtype = a.dtype;
  args.num_threads = a.num_threads;
  return args;
}

void Stack::norm_heads(char* x, const void* weight, int64_t heads) const {
  LK_VARIANT::rms_norm({x, a.d, weight, nullptr, 0, x, a.d, rows * heads, a.d, a.eps, a.dtype, a.num_threads});
}

// With `residual`, adds to hidden.
void Stack::linear(const void* x, int64_t x_stride, int64_t c, const LinearWeight* weights, int64_t count,
                   const void* norm, bool residual) const {
  LK_VARIANT::small_linear({x, x_stride, rows, c, weights, count, norm, a.eps, residual ? hidden : nullptr,
                            hidden_stride, a.dtype, a.num_threads});
}

void Stack::attend(const StackLayer& layer, int64_t index) const {
  const LinearWeight qkv[] = {weight_of(layer.q, scratch.q), weight_of(layer.k, scratch.k),
                              weight_of(layer.v, scratch.v)};
  linear(hidden, hidden_stride, a.c, qkv, 3, layer.attn_norm, false);
  if (layer.q_norm) {
    norm_heads(scratch.q, layer.q_norm, layer.q.n / a.d);
    norm_heads(scratch.k, layer.k_norm, a.g);
  }
  const RopeAppendArgs rope = rope_args(layer, index);
  LK_VARIANT::rope_append(rope);

  VerifyAttentionArgs args{};
  args.q = rope.q;
  args.k_cache = rope.k_cache;
  args.v_cache = rope.v_cache;
  args.out = scratch.attended;
  for (int i = 0; i < 3; ++i) {
    args.q_stride[i] = args.out_stride[i] = rope.q_stride[i];
    args.k_cache_stride[i] = rope.k_cache_stride[i];
    args.v_cache_stride[i] = rope.v_cache_stride[i];
  }
  args.lengths = a.lengths;
  args.slot_ids = a.slot_ids;
  args.num_queries = a.num_queries;
  args.sliding_window = layer.sliding_window;
  args.scale = a.scale;
  args.b = a.b, args.t = a.t, args.h = rope.h, args.g = a.g, args.d = a.d;
  args.dtype = a.dtype;
  args.num_threads = a.num_threads;
  LK_VARIANT::verify_attention(args);

  const LinearWeight o = weight_of(layer.o, hidden, hidden_stride);
  linear(scratch.attended, layer.q.n, layer.q.n, &o, 1, nullptr, true);
}

void Stack::feed_forward(const StackLayer& layer) const {
  const int64_t mlp = layer.gate.n;
  const LinearWeight gate_up[] = {weight_of(layer.gate, scratch.gate), weight_of(layer.up, scratch.up)};
  linear(hidden, hidden_stride, a.c, gate_up, 2, layer.mlp_norm, false);
  LK_VARIANT::swiglu({scratch.gate, mlp, scratch.up, mlp, scratch.gate, mlp, rows, mlp, a.dtype, a.num_threads});
  const LinearWeight down = weight_of(layer.down, hidden, hidden_stride);
  linear(scratch.gate, mlp, mlp, &down, 1, nullptr, true);
}

void Stack::copy_hidden(bool back) const {
  const size_t row_bytes = size_t(a.c * size);
  for (int64_t row = 0; row < rows; ++row) {
    char* outer = static_cast<char*>(a.hidden) +
                  (row / a.t * a.hidden_stride[0] + row % a.t * a.hidden_stride[1]) * size;
    char* inner = scratch.hidden + size_t(row) * row_bytes;
    memcpy(back ? outer : inner, back ? inner : outer, row_bytes);
  }
}

}  // namespace

void decoder_stack(const DecoderStackArgs& args) {
  if (args.b == 0 || args.t == 0 || args.num_layers == 0) return;
  Stack stack{args, args.b * args.t, int64_t(size_of(args.dtype)), static_cast<char*>(args.hidden), 0, {}};
  const int64_t* stride = args.hidden_stride;
  const bool flat = args.b == 1 || args.t == 1 || stride[0] == args.t * stride[1];
  stack.hidden_stride = args.t == 1 ? stride[0] : stride[1];
  stack.carve(!flat);
  if (!flat) {
    stack.hidden = stack.scratch.hidden;
    stack.hidden_stride = args.c;
    stack.copy_hidden(false);
  }
  stack.fill_tables();
  for (int64_t i = 0; i < args.num_layers; ++i) {
    stack.attend(args.layers[i], i);
    stack.feed_forward(args.layers[i]);
  }
  if (!flat) stack.copy_hidden(true);
}

}  // namespace lk::LK_VARIANT
