#include "cpu/quantized_panel.h"

#include "cpu/quantized_dot.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

// Packed x that weight rows are multiplied with before the next columns are: it stays in the second-level cache.
constexpr int64_t kPackedBytes = 64 << 10;
constexpr float kSmallest = 0x1p-100f;

// Weight rows of a register tile with `cols` x rows.
constexpr int rows_of(int cols) { return cols < 3 || kRegisters >= 24 ? 4 : 2; }

// What a pass over the columns [blocks from first to last) of some weight rows needs.
struct Span {
  const QuantizedRows& x;
  const uint8_t* w;  // row 0 of the weight
  int64_t w_stride;
  const Quantization& q;
  int64_t first, last;
};

// How far ahead memory is fetched: bytes of values, and of scales.
struct Ahead {
  int64_t bytes, scale_bytes;
};

LK_INLINE int64_t scale_size(const Quantization& q) { return int64_t(size_of(DType(q.scale_dtype))); }

// The scales (or offsets) of kWidth blocks from `block` on; zero from `count` of them on.
template <class T>
LK_INLINE vf of_blocks(const T* row, int64_t blocks_per_group, int64_t block, int64_t count) {
  if (blocks_per_group == 1) return count < kWidth ? load(row + block, count) : load(row + block);
  alignas(64) float values[kWidth] = {};
  int64_t group = block / blocks_per_group, left = blocks_per_group - block % blocks_per_group;
  for (int64_t i = 0; i < count; ++i, --left) {
    if (left == 0) ++group, left = blocks_per_group;
    values[i] = to_float(row[group]);
  }
  return load(values);
}

// Adds to the vectors sums[i * kTileRows + j] the products of weight row n + j and packed row m + i, over the span's
// columns; what they add up to once all columns are done is the dot product. For every tile and span one vector per
// product, blocks in rising order: neither can change a bit. Meanwhile values and scales `ahead` are fetched: of the
// scales the processor by itself fetches too late. Where memory is what a tile waits for, it asks for values twice or three
// times, as some requests are dropped (see dot.h).
template <int kBits, int kRows, int kCols>
void tile(const Span& s, int64_t n, int64_t m, Ahead ahead, vf* sums_at) {
  constexpr int64_t kBytes = Stored<kBits>::kBytes;
  const int64_t per_group = s.q.group / kBlock, whole = s.x.c / kBlock, size = scale_size(s.q);
  const uint8_t* w = s.w + n * s.w_stride + s.first * kBytes;
  const int16_t* x = s.x.words_of(s.first, m);
  vf sums[kRows][kCols];
  LK_UNROLL for (int j = 0; j < kRows; ++j)
    LK_UNROLL for (int i = 0; i < kCols; ++i) sums[j][i] = sums_at[i * kTileRows + j];
#pragma GCC unroll 1
  for (int64_t block = s.first; block < s.last; block += kWidth) {
    const int64_t count = s.last - block < kWidth ? s.last - block : kWidth;
    alignas(64) float factors[kRows][kCols][kWidth];
    LK_UNROLL for (int j = 0; j < kRows; ++j) {
      const char* scales = static_cast<const char*>(s.q.scale) + (n + j) * s.q.scale_stride * size;
      prefetch_l2(scales + block / per_group * size + ahead.scale_bytes);
      const vf scale = size == sizeof(bf16) ? of_blocks(reinterpret_cast<const bf16*>(scales), per_group, block, count)
                                            : of_blocks(reinterpret_cast<const float*>(scales), per_group, block, count);
      vf shift = kBits == 4 ? mul(scale, set1(-8)) : zero();
      if (s.q.offset)
        shift = add(shift, of_blocks(s.q.offset + (n + j) * s.q.offset_stride, per_group, block, count));
      LK_UNROLL for (int i = 0; i < kCols; ++i) {
        store(factors[j][i], mul(scale, load(s.x.scales_of(m + i) + block)));
        if (kBits == 4 || s.q.offset)
          sums[j][i] = accumulate(sums[j][i], shift, load(s.x.sums_of(m + i) + block));
      }
    }
    const int64_t complete = block + count <= whole ? count : whole - block;
#pragma GCC unroll 1
    for (int64_t i = 0; i < complete; ++i, w += kBytes, x += s.x.m * kBlock) {
      const auto ask = [&](int64_t distance) __attribute__((always_inline)) {
        LK_UNROLL for (int j = 0; j < kRows; ++j) prefetch_l2(w + j * s.w_stride + distance);
      };
      if constexpr (kCols == 1 || (kCols == 2 && kRegisters >= 24)) ask(2 * ahead.bytes);
      ask(ahead.bytes);
      if constexpr (kCols == 1 && kBits == 8) ask(ahead.bytes - 8 * kBytes);
      add_block<kBits>(sums, w, s.w_stride, x,
                       reinterpret_cast<const float(*)[kCols][kWidth]>(&factors[0][0][i]));
    }
    if (complete < count) {
      alignas(64) uint8_t last[kRows][kBytes] = {};
      for (int j = 0; j < kRows; ++j) memcpy(last[j], w + j * s.w_stride, size_t(s.x.c % kBlock * kBits / 8));
      add_block<kBits>(sums, last[0], kBytes, x,
                       reinterpret_cast<const float(*)[kCols][kWidth]>(&factors[0][0][complete]));
    }
  }
  LK_UNROLL for (int j = 0; j < kRows; ++j)
    LK_UNROLL for (int i = 0; i < kCols; ++i) sums_at[i * kTileRows + j] = sums[j][i];
}

// Weight rows [n, n + kRows) against all x rows, cut into tiles of nearly equal width: kCols or one less.
template <int kBits, int kRows, int kCols>
void strip(const Span& s, int64_t n, Ahead ahead, vf* sums) {
  const int64_t tiles = (s.x.m + kCols - 1) / kCols;
  const int64_t narrow = tiles * kCols - s.x.m;
  int64_t m = 0;
  for (int64_t t = narrow; t < tiles; ++t, m += kCols)
    tile<kBits, kRows, kCols>(s, n, m, ahead, sums + m * kTileRows);
  if constexpr (kCols > 1)
    for (; m < s.x.m; m += kCols - 1) tile<kBits, kRows, kCols - 1>(s, n, m, ahead, sums + m * kTileRows);
}

// Weight rows [begin, end), at most kTileRows.
template <int kBits, int kCols>
void rows(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  constexpr int kRows = rows_of(kCols);
  const int64_t blocks = x.blocks(), count = end - begin;
  int64_t step = kPackedBytes / (x.m * kBlock * int64_t(sizeof(int16_t))) / kWidth * kWidth;
  if (step < kWidth) step = kWidth;
  if (step > blocks) step = blocks;
  const int64_t bytes = (step + 1) * Stored<kBits>::kBytes;
  int64_t lead = kRows + kAheadBytes / (bytes * kRows) * kRows;
  if (lead > kTileRows) lead = kTileRows;
  vf sums[kMaxPackedRows * kTileRows];
  for (int64_t i = 0; i < x.m * kTileRows; ++i) sums[i] = zero();
  for (int64_t first = 0; first < blocks; first += step) {
    const int64_t last = first + step < blocks ? first + step : blocks;
    const Span span{x, static_cast<const uint8_t*>(w.data), w.stride, w.quantization, first, last};
    // Where the rows `lead` ahead lie: in these columns, in the next ones of the first rows, or in the next rows.
    const auto distance = [&](int64_t n, int64_t stride, int64_t before, int64_t span) {
      if (n + lead < end) return lead * stride;
      if (last < blocks) return (lead - count) * stride + span;
      return n + lead < w.n ? lead * stride - before : 0;
    };
    const int64_t per_group = w.quantization.group / kBlock, size = scale_size(w.quantization);
    auto ahead = [&](int64_t n) {
      return Ahead{distance(n, w.stride, first * Stored<kBits>::kBytes, step * Stored<kBits>::kBytes),
                   distance(n, w.quantization.scale_stride, first / per_group, step / per_group) * size};
    };
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows) strip<kBits, kRows, kCols>(span, n, ahead(n), sums + (n - begin));
    for (; n < end; ++n) strip<kBits, 1, kCols>(span, n, ahead(n), sums + (n - begin));
  }
  for (int64_t i = 0; i < x.m; ++i) {
    const vf* v = sums + i * kTileRows;
    float* totals = out.data + i * out.stride;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) sum4(v[j], v[j + 1], v[j + 2], v[j + 3], totals + j);
    for (; j < count; ++j) totals[j] = sum(v[j]);
  }
}

template <int kBits>
void rows_of_width(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  const int64_t tiles = (x.m + kMaxCols - 1) / kMaxCols;
  switch ((x.m + tiles - 1) / tiles) {
    case 1: return rows<kBits, 1>(w, x, begin, end, out);
    case 2: return rows<kBits, 2>(w, x, begin, end, out);
    case 3: return rows<kBits, 3>(w, x, begin, end, out);
    case 4: return rows<kBits, 4>(w, x, begin, end, out);
  }
}

template <int kBits>
LK_INLINE void reorder(const int32_t* q, int16_t* words) {
  constexpr int64_t kRun = Stored<kBits>::kRun, kStep = Stored<kBits>::kStep;
  for (int64_t group = 0; group < kBlock; group += kRun * kStep)
    for (int64_t step = 0; step < kStep; ++step)
      for (int64_t i = 0; i < kRun; ++i) words[group + step * kRun + i] = int16_t(q[group + step + i * kStep]);
}

}  // namespace

QuantizedRows::QuantizedRows(int64_t rows, int64_t columns, int64_t b, Workspace use) : m(rows), c(columns), bits(b) {
  const int64_t bytes = blocks() * kBlock * int64_t(sizeof(int16_t)) + 2 * scales() * int64_t(sizeof(float));
  data = static_cast<char*>(workspace(use, size_t(rows * bytes)));
}

template <class T>
void QuantizedRows::pack(int64_t row, const T* x) {
  float *scale = scales_of(row), *sum = sums_of(row);
  for (int64_t block = blocks(); block < scales(); ++block) scale[block] = sum[block] = 0;
  for (int64_t block = 0; block < blocks(); ++block, x += kBlock) {
    const int64_t count = c - block * kBlock;
    alignas(64) float values[kBlock];
    vf largest = zero(), none = zero();
    for (int64_t i = 0; i < kBlock; i += kWidth) {
      const vf v = count - i >= kWidth ? load(x + i) : count > i ? load(x + i, count - i) : zero();
      store(values + i, v);
      largest = max(largest, max(v, sub(zero(), v)));
      none = fma(v, zero(), none);  // NaN from NaN and infinity on, which max() may lose
    }
    alignas(64) int32_t q[kBlock] = {};
    scale[block] = sum[block] = 0;
    const float most = max_of(largest), nothing = lk::LK_VARIANT::sum(none);
    if (nothing != 0) {
      scale[block] = sum[block] = nothing;
    } else if (most >= kSmallest) {
      // The power of two that brings the largest to 2^14 and above: small whole numbers and bfloat16 stay exact.
      const uint32_t exponent = float_bits(most) & 0x7f800000;
      const float inverse = float_from_bits((uint32_t(2 * 127 + 14) << 23) - exponent);
      for (int64_t i = 0; i < kBlock; i += kWidth) {
        const vf v = min(round_int(mul(load(values + i), set1(inverse))), set1(32767));
        const Ints whole = __builtin_convertvector(v, Ints);
        memcpy(q + i, &whole, sizeof(whole));
      }
      int32_t total = 0;
      for (int64_t i = 0; i < kBlock; ++i) total += q[i];
      scale[block] = float_from_bits(exponent - (uint32_t(14) << 23));
      sum[block] = scale[block] * float(total);
    }
    if (bits == 8) reorder<8>(q, words_of(block, row)); else reorder<4>(q, words_of(block, row));
  }
}
template void QuantizedRows::pack(int64_t, const float*);
template void QuantizedRows::pack(int64_t, const f16*);
template void QuantizedRows::pack(int64_t, const bf16*);

void QuantizedRows::panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const {
  for (; begin < end; begin += kTileRows, out.data += kTileRows) {
    const int64_t stop = begin + kTileRows < end ? begin + kTileRows : end;
    if (bits == 8) rows_of_width<8>(w, *this, begin, stop, out); else rows_of_width<4>(w, *this, begin, stop, out);
  }
}

}  // namespace lk::LK_VARIANT
