// swiglu, rope_append, kv_rollback, verify_attention, decoder_stack: a whole call against each of its rows alone.
#include "check.h"

namespace {

// One layer's k and v: [slots, g, s, d] without gaps.
struct Cache {
  int64_t slots, g, s, d;
  int64_t size() const { return slots * g * s * d; }
  void strides(int64_t (&to)[3]) const { to[0] = g * s * d, to[1] = s * d, to[2] = d; }
};

void dense(int64_t t, int64_t heads, int64_t d, int64_t (&to)[3]) {
  to[0] = t * heads * d, to[1] = heads * d, to[2] = d;
}

template <class T>
void activation(int num_threads) {
  for (int64_t n : {1, 83, 5125}) {
    const int64_t m = 3, stride = n + 1;
    const auto gate = random_buffer<T>(span(m, stride, n), 1, 4), up = random_buffer<T>(span(m, stride, n), 2);
    Buffer<T> over(gate);
    lk::swiglu({over, stride, up, stride, over, stride, m, n, dtype_of<T>, num_threads});
    for (int64_t row = 0; row < m; ++row) {
      Buffer<T> alone(n);
      lk::swiglu({gate + row * stride, n, up + row * stride, n, alone, n, 1, n, dtype_of<T>, 1});
      expect(same<T>(alone, over + row * stride, n), "swiglu row", int(dtype_of<T>), n, row);
    }
  }
}

template <class T>
void rope(int num_threads) {
  for (int64_t d : {8, 40, 256}) {
    const int64_t b = 2, t = 5, h = 6, g = 2;
    const Cache cache{2, g, 9, d};
    const auto q = random_buffer<T>(b * t * h * d, 1), k = random_buffer<T>(b * t * g * d, 2);
    const auto v = random_buffer<T>(b * t * g * d, 3), empty = random_buffer<T>(cache.size(), 4);
    const auto frequencies = random_buffer<float>(d / 2, 5);
    Buffer<int32_t> lengths(b), positions(b * t), slots(b), rows(b);
    for (int64_t i = 0; i < b; ++i) {
      lengths[i] = int32_t(4 - i);
      slots[i] = int32_t(1 - i);
      rows[i] = int32_t(5 - 2 * i);
    }
    for (int64_t i = 0; i < b * t; ++i) positions[i] = int32_t(1000 * i);
    Buffer<T> q_all(q), k_all(empty), v_all(empty), q_one(q), k_one(empty), v_one(empty);
    lk::RopeAppendArgs args{};
    args.q = q_all, args.k = k, args.v = v, args.k_cache = k_all, args.v_cache = v_all;
    dense(t, h, d, args.q_stride);
    dense(t, g, d, args.k_stride);
    dense(t, g, d, args.v_stride);
    cache.strides(args.k_cache_stride);
    cache.strides(args.v_cache_stride);
    args.lengths = lengths, args.positions = positions, args.positions_stride = t, args.inv_freq = frequencies;
    args.attention_factor = 1.25f, args.slot_ids = slots, args.num_queries = rows;
    args.b = b, args.t = t, args.h = h, args.g = g, args.d = d;
    args.dtype = dtype_of<T>, args.num_threads = num_threads;
    lk::rope_append(args);
    args.num_queries = nullptr, args.k_cache = k_one, args.v_cache = v_one, args.b = args.t = 1, args.num_threads = 1;
    for (int64_t i = 0; i < b; ++i)
      for (int64_t row = 0; row < rows[i]; ++row) {
        const int64_t index = i * t + row;
        const int32_t length = int32_t(lengths[i] + row);
        args.q = q_one + index * h * d, args.k = k + index * g * d, args.v = v + index * g * d;
        args.positions = positions + index, args.lengths = &length, args.slot_ids = slots + i;
        lk::rope_append(args);
      }
    expect(same<T>(q_all, q_one, q.size), "rope_append q", int(dtype_of<T>), d);
    expect(same<T>(k_all, k_one, cache.size()), "rope_append k", int(dtype_of<T>), d);
    expect(same<T>(v_all, v_one, cache.size()), "rope_append v", int(dtype_of<T>), d);
  }
}

template <class T>
void rollback(int num_threads) {
  const int64_t layers = 3, b = 2, g = 2, s = 10, d = 8, window = 6, row = layers * b * g;
  const auto before = random_buffer<T>(row * s * d, 1);
  Buffer<T> k(before), v(before);
  Buffer<int32_t> lengths(b), keep(b), path(b * window);
  const int32_t moves[] = {5, 4, 3, 3, -1, 99, 1, 2, 3, 4, 5, 0};
  for (int64_t i = 0; i < b * window; ++i) path[i] = moves[i];
  lengths[0] = 4, lengths[1] = 0, keep[0] = 4, keep[1] = 6;
  lk::KvRollbackArgs args{};
  args.k_cache = k, args.v_cache = v;
  for (int64_t* stride : {args.k_cache_stride, args.v_cache_stride})
    stride[0] = b * g * s * d, stride[1] = g * s * d, stride[2] = s * d, stride[3] = d;
  args.lengths = lengths, args.keep = keep, args.path = path, args.path_stride = window, args.window = window;
  args.scrub = true, args.layers = layers, args.b = b, args.g = g, args.d = d;
  args.dtype = dtype_of<T>, args.num_threads = num_threads;
  lk::kv_rollback(args);
  expect(lengths[0] == 8 && lengths[1] == 6, "kv_rollback lengths");
  const Buffer<T> zeros = random_buffer<T>(d, 1, 0);
  for (int64_t head = 0; head < row; ++head)
    for (int64_t j = 0; j < s; ++j) {
      const int64_t i = head / g % b, start = i ? 0 : 4, t = j - start;
      const T* wanted = before + (head * s + j) * d;
      if (t >= 0 && t < keep[i]) wanted = before + (head * s + start + moves[i * window + t]) * d;
      else if (t >= 0 && t < window) wanted = zeros;
      expect(same<T>(k + (head * s + j) * d, wanted, d) && same<T>(v + (head * s + j) * d, wanted, d),
             "kv_rollback position", int(dtype_of<T>), head, j);
    }
}

template <class T>
void attention(int num_threads) {
  const int64_t shapes[][5] = {{5, 4, 1, 40, 0}, {3, 6, 2, 64, 100}, {70, 3, 1, 8, 0}, {1, 2, 2, 256, 0}};  // t h g d W
  for (const auto& [t, h, g, d, sliding] : shapes) {
    const int64_t b = 2, lengths[] = {126, 0};
    const Cache cache{b, g, 126 + t, d};
    const auto q = random_buffer<T>(b * t * h * d, 1, 2), k = random_buffer<T>(cache.size(), 2);
    const auto v = random_buffer<T>(cache.size(), 3);
    Buffer<T> all(q.size), one(h * d);
    Buffer<int32_t> past(b), rows(b);
    for (int64_t i = 0; i < b; ++i) past[i] = int32_t(lengths[i]), rows[i] = int32_t(i ? t - 1 : t);
    lk::VerifyAttentionArgs args{};
    args.q = q, args.k_cache = k, args.v_cache = v, args.out = all;
    dense(t, h, d, args.q_stride);
    dense(t, h, d, args.out_stride);
    cache.strides(args.k_cache_stride);
    cache.strides(args.v_cache_stride);
    args.lengths = past, args.num_queries = rows, args.sliding_window = sliding, args.scale = 0.2f;
    args.b = b, args.t = t, args.h = h, args.g = g, args.d = d;
    args.dtype = dtype_of<T>, args.num_threads = num_threads;
    lk::verify_attention(args);
    args.num_queries = nullptr, args.out = one, args.b = args.t = 1, args.num_threads = 1;
    for (int32_t i = 0; i < b; ++i)
      for (int64_t row = 0; row < rows[i]; ++row) {
        const int32_t length = int32_t(lengths[i] + row);
        args.q = q + (i * t + row) * h * d, args.lengths = &length, args.slot_ids = &i;
        lk::verify_attention(args);
        expect(same<T>(one, all + (i * t + row) * h * d, h * d), "verify_attention row", int(dtype_of<T>), t, d, row);
      }
  }
}

template <class T>
void stack(int num_threads, int64_t bits) {
  const int64_t layers = 2, b = 2, t = 3, c = 40, h = 4, g = 2, d = 16, mlp = 70, gap = c + 3;
  const Cache cache{b, g, 12, d};
  const auto norm = random_buffer<T>(c, 1, 0.2f, 1), head_norm = random_buffer<T>(d, 2, 0.2f, 1);
  const auto wide = random_buffer<T>(h * d * c, 3, 0.3f), narrow = random_buffer<T>(g * d * c, 4, 0.3f);
  const auto up = random_buffer<T>(mlp * c, 5, 0.3f), bias = random_buffer<T>(mlp, 6);
  const auto before = random_buffer<T>(b * t * gap, 7);
  const auto frequencies = random_buffer<float>(d / 2, 8);
  lk::StackLinear q{wide, c, h * d, bias}, kv{narrow, c, g * d, nullptr}, o{wide, h * d, c, nullptr};
  lk::StackLinear gate{up, c, mlp, bias}, down{up, mlp, c, nullptr};
  const int64_t b8 = bits ? bits : 8;
  const Quantized weights[] = {{h * d, c, b8, 64, false, 11}, {g * d, c, b8, 64, true, 12}, {c, h * d, b8, 128, false, 13},
                               {mlp, c, b8, 64, false, 14}, {c, mlp, b8, 64, true, 15}};
  lk::StackLinear* linears[] = {&q, &kv, &o, &gate, &down};
  for (int i = 0; bits && i < 5; ++i)
    *linears[i] = {weights[i].values, weights[i].stride, linears[i]->n, linears[i]->bias, weights[i].format};
  const lk::StackLayer list[] = {{norm, q, kv, kv, o, norm, gate, gate, down, head_norm, head_norm, 0, 1},
                                 {norm, q, kv, kv, o, norm, gate, gate, down, nullptr, nullptr, 2, 0}};
  Buffer<T> hidden(before), one(c), k(layers * cache.size()), v(layers * cache.size());
  Buffer<int32_t> lengths(b), positions(b * t);
  for (int64_t i = 0; i < b * t; ++i) lengths[i / t] = 0, positions[i] = int32_t(i % t);
  lk::DecoderStackArgs args{};
  args.hidden = hidden, args.hidden_stride[0] = t * gap, args.hidden_stride[1] = gap;
  args.layers = list, args.num_layers = layers, args.k_cache = k, args.v_cache = v;
  for (int64_t* stride : {args.k_cache_stride, args.v_cache_stride})
    stride[0] = cache.size(), stride[1] = g * cache.s * d, stride[2] = cache.s * d, stride[3] = d;
  args.eps = 1e-5f, args.scale = 0.25f, args.lengths = lengths, args.positions = positions, args.positions_stride = t;
  args.inv_freq = frequencies, args.attention_factor = 1, args.b = b, args.t = t, args.c = c, args.g = g, args.d = d;
  args.dtype = dtype_of<T>, args.num_threads = num_threads;
  lk::decoder_stack(args);
  Buffer<T> k_one(k.size), v_one(v.size);
  args.k_cache = k_one, args.v_cache = v_one, args.b = args.t = 1, args.num_threads = 1, args.hidden = one;
  for (int32_t i = 0; i < b; ++i)
    for (int32_t row = 0; row < t; ++row) {
      memcpy(one, before + (i * t + row) * gap, size_t(c) * sizeof(T));
      args.lengths = args.positions = &row, args.slot_ids = &i;
      lk::decoder_stack(args);
      expect(same<T>(one, hidden + (i * t + row) * gap, c), "decoder_stack row", int(dtype_of<T>), i, row);
      expect(same<T>(hidden + (i * t + row) * gap + c, before + (i * t + row) * gap + c, gap - c), "decoder_stack gap");
    }
}

}  // namespace

void check_swiglu(int num_threads) { FOR_EVERY_DTYPE(activation, num_threads); }
void check_rope_append(int num_threads) { FOR_EVERY_DTYPE(rope, num_threads); }
void check_kv_rollback(int num_threads) { FOR_EVERY_DTYPE(rollback, num_threads); }
void check_verify_attention(int num_threads) { FOR_EVERY_DTYPE(attention, num_threads); }
void check_decoder_stack(int num_threads) {
  for (int64_t bits : {0, 8, 4}) {
    stack<float>(num_threads, bits);
    stack<lk::f16>(num_threads, bits);
    stack<lk::bf16>(num_threads, bits);
  }
}
