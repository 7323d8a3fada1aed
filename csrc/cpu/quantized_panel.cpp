#include "cpu/quantized_panel.h"

#include "cpu/quantized_scales.h"
#if defined(LK_VARIANT_AVX512_AMX)
#include "cpu/quantized_tiles.h"
#endif

namespace lk::LK_VARIANT {
namespace {

// Packed x that weight rows are multiplied with before the next columns are: it stays in the second-level cache, or with
// tiles of fewer x rows, which read it faster, in the first.
constexpr int64_t kPackedBytes = (kWholeSteps ? 256 : 16) << 10;
constexpr int64_t kMostUnits = kPackedBytes / (kBlock * int64_t(sizeof(int16_t))) / kLanes + 5;  // of these columns

// Weight rows of a register tile with `cols` x rows. More than four of 8 bits wait for memory longer than they save.
template <int kBits>
constexpr int rows_of(int cols) {
  if (kRegisters < 24) return cols < 3 ? 4 : 2;
  if (!kWholeSteps) return kRegisters / kSumRegisters / cols < 4 ? kRegisters / kSumRegisters / cols : 4;
  if (cols > 6) return 3;
  return kBits == 4 && cols == 3 ? 8 : kBits == 4 && cols == 4 ? 6 : 4;
}

// As for weights in their dtype, measured again: arithmetic is waited for sooner.
template <int kBits>
constexpr int64_t most_cols(int64_t m) {
  if (!kWholeSteps) return 4;
  return kBits == 8 ? 8 : m <= 6 || (m > 8 && m <= 12) ? 6 : 4;
}

// What a pass over the columns [blocks from first to last) of some weight rows needs.
struct Span {
  const QuantizedRows& x;
  const uint8_t* w;  // row 0 of the weight
  int64_t w_stride;
  const Quantization& q;
  int64_t first, first_unit, num_units;
  const Columns* units;
};

// How far ahead memory is fetched: bytes of values, and of scales.
struct Ahead {
  int64_t bytes, scale_bytes;
};

// Offset times the sum of x, which is added to a unit's products where the weight has offsets.
template <int kRows, int kCols>
__attribute__((noinline)) void add_offsets(const Quantization& q, int64_t n, const PackedLanes* x, const Columns& columns,
                                           int half, vf* sums) {
  for (int j = 0; j < kRows; ++j) {
    const vf offset = offsets_of(q, n + j, columns, half);
    for (int i = 0; i < kCols; ++i) {
      const vf total = __builtin_convertvector(load_vector<Ints>(x[i].sums + half * kWidth), vf);
      vf& sum = sums[(i * kTileRows + j) * kHalves + half];
      sum = accumulate(sum, offset, mul(total, load(x[i].scales + half * kWidth)));
    }
  }
}

// Adds to the vectors sums[(i * kTileRows + j) * kHalves + h] the products of weight row n + j and packed row m + i, over
// the span's columns, or begins them where those are a row's first; what they add up to once all columns are done is the dot
// product. For every tile and span one vector per product and half, units in rising order: neither can change a bit.
// Meanwhile values and scales `ahead` are fetched: of the scales the processor by itself fetches too late. Where memory is
// what a tile waits for, it asks for values twice or three times, as some requests are dropped (see dot.h).
template <int kBits, int kRows, int kCols>
void tile(const Span& s, int64_t n, int64_t m, Ahead ahead, vf* sums) {
  constexpr int64_t kBytes = Stored<kBits>::kBytes, kSteps = Stored<kBits>::kSteps;
  constexpr int kEarlyCols = kWholeSteps ? kMaxCols : 1, kAgainCols = kBits == 4 ? 0 : kWholeSteps ? 6 : 1;
  const bool alone = s.x.m == kCols;  // otherwise the tiles of a strip ask for the same
  const bool early = kCols <= kEarlyCols && (alone || (kBits == 8 && kCols == 6));
  const int64_t x_step = s.x.m * kBlock, w_stride = s.w_stride;
  const int64_t size = scale_size(s.q), scale_stride = s.q.scale_stride * size;
  const bool narrow = s.q.scale_dtype == int64_t(DType::bf16);
  const uint8_t* row = s.w + n * w_stride + s.first * kBytes;
  const int16_t* packed = s.x.words_of(s.first, m);
  const PackedLanes* lanes = s.x.lanes_of(s.first_unit, m);
  for (const Columns* columns = s.units; columns < s.units + s.num_units; ++columns, lanes += s.x.m) {
    for (int half = 0; half < kHalves; ++half) {
      Sums dots[kRows][kCols];
      LK_UNROLL for (int i = 0; i < kCols; ++i) {
        const Ints first = kBits == 4 ? load_vector<Ints>(lanes[i].sums + half * kWidth) * -8 : Ints{};
        LK_UNROLL for (int j = 0; j < kRows; ++j) dots[j][i] = start(first);
      }
      const uint8_t* w = row + half * kWidth * 4;
      const int16_t* x = packed + half * kWords;
      const uint8_t* fetch = w + ahead.bytes;
      const auto ask = [&](int64_t distance) __attribute__((always_inline)) {
        LK_UNROLL for (int j = 0; j < kRows; ++j) prefetch_l2(fetch + j * w_stride + distance);
      };
      const bool asks = kHalves <= 2 || half == 0;  // of four vectors in a line one is enough
      const auto ask_ahead = [&]() __attribute__((always_inline)) {
        if (!asks) return;
        if (early) ask(ahead.bytes);
        ask(0);
      };
      if (columns->unit.blocks > 1 || (kBits == 8 && columns->count == kBlock)) {
#pragma GCC unroll 1
        for (int64_t i = columns->unit.blocks / kSteps; i > 0; --i) {
          ask_ahead();
          if (kCols <= kAgainCols && alone && asks) ask(-8 * kBytes);
          add_steps<kBits>(dots, w, w_stride, x, x_step);
          w += kSteps * kBytes, x += kSteps * x_step, fetch += kSteps * kBytes;
        }
      } else {
        // A block of columns in order: of 4 bits, or less than a whole one.
        alignas(64) uint8_t last[kRows][kBytes] = {};
        ask_ahead();
        const uint8_t* from = row;
        int64_t stride = w_stride;
        if (columns->count < kBlock) {
          for (int j = 0; j < kRows; ++j) memcpy(last[j], row + j * w_stride, size_t(columns->count * kBits / 8));
          from = last[0], stride = kBytes;
        }
        if constexpr (kBits == 8)
          add_steps<8>(dots, from + half * kWidth * 4, stride, x, x_step);
        else
          add_nibbles(dots, from + half * kWords, stride, x);
      }
      const char* scales = static_cast<const char*>(s.q.scale) + n * scale_stride + columns->first[half] * size;
      vf w_scales[kRows], x_scales[kCols];
      LK_UNROLL for (int j = 0; j < kRows; ++j, scales += scale_stride) {
        if (half == 0) prefetch_l2(scales + ahead.scale_bytes);
        w_scales[j] = narrow ? of_lanes(reinterpret_cast<const bf16*>(scales), *columns, half)
                             : of_lanes(reinterpret_cast<const float*>(scales), *columns, half);
      }
      LK_UNROLL for (int i = 0; i < kCols; ++i) x_scales[i] = load(lanes[i].scales + half * kWidth);
      const auto add_to = [&](auto before) __attribute__((always_inline)) {
        vf* to = sums + half;
        LK_UNROLL for (int j = 0; j < kRows; ++j, to += kHalves) {
          LK_UNROLL for (int i = 0; i < kCols; ++i) {
            vf& sum = to[i * kTileRows * kHalves];
            sum = accumulate(before(sum), __builtin_convertvector(total(dots[j][i]), vf), mul(w_scales[j], x_scales[i]));
          }
        }
      };
      if (columns->unit.first == 0)
        add_to([](const vf&) { return zero(); });
      else
        add_to([](const vf& sum) { return sum; });
      if (s.q.offset) add_offsets<kRows, kCols>(s.q, n, lanes, *columns, half, sums);
    }
    row += columns->unit.blocks * kBytes, packed += columns->unit.blocks * x_step;
  }
}

// Weight rows [n, n + kRows) against all x rows, cut into tiles of nearly equal width: kCols or one less.
template <int kBits, int kRows, int kCols>
void strip(const Span& s, int64_t n, Ahead ahead, vf* sums) {
  const int64_t tiles = (s.x.m + kCols - 1) / kCols;
  const int64_t narrow = tiles * kCols - s.x.m;
  int64_t m = 0;
  for (int64_t t = narrow; t < tiles; ++t, m += kCols)
    tile<kBits, kRows, kCols>(s, n, m, ahead, sums + m * kTileRows * kHalves);
  if constexpr (kCols > 1)
    for (; m < s.x.m; m += kCols - 1) tile<kBits, kRows, kCols - 1>(s, n, m, ahead, sums + m * kTileRows * kHalves);
}

// The sum of a step's vectors: halves onto each other, as in sum().
template <int kFirst = 0, int kStep = 1>
LK_INLINE vf fold(const vf* v) {
  if constexpr (kStep == kHalves) return v[kFirst];
  else return add(fold<kFirst, 2 * kStep>(v), fold<kFirst + kStep, 2 * kStep>(v));
}

// Weight rows [begin, end), at most kTileRows.
template <int kBits, int kCols, int kRows = rows_of<kBits>(kCols)>
void rows(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  const int64_t blocks = x.blocks(), count = end - begin;
  const int64_t per_group = w.quantization.group / kBlock, size = scale_size(w.quantization);
  const int64_t groups = per_group == 1 ? blocks : (blocks + per_group - 1) / per_group;
  int64_t step = kPackedBytes / (x.m * kBlock * int64_t(sizeof(int16_t))) / kLanes * kLanes;
  if (step < kLanes) step = kLanes;
  if (step > blocks) step = blocks;
  const int64_t bytes = (step + 1) * Stored<kBits>::kBytes;
  int64_t lead = kRows + kAheadBytes / (bytes * kRows) * kRows;
  if (lead > kTileRows) lead = kTileRows;
  vf sums[kMaxPackedRows * kTileRows * kHalves];
  if (blocks == 0) memset(sums, 0, sizeof(sums));  // no tile will begin them
  int64_t unit = x.tiled();
#if defined(LK_VARIANT_AVX512_AMX)
  if (unit > 0) begin_tiled<kBits>(w, x, begin, end, sums);
#endif
  for (int64_t first = unit * kLanes; first < blocks; first += step) {
    const int64_t last = first + step < blocks ? first + step : blocks;
    Columns columns[kMostUnits];
    int64_t count_units = 0;
    for (int64_t block = first; block < last; block += columns[count_units++].unit.blocks)
      columns_of(unit_from(block, x.whole()), x.c, per_group, groups, columns + count_units);
    const Span span{x, static_cast<const uint8_t*>(w.data), w.stride, w.quantization, first, unit, count_units, columns};
    unit += count_units;
    // Where the rows `lead` ahead lie: in these columns, in the next ones of the first rows, or in the next rows.
    const auto distance = [&](int64_t n, int64_t stride, int64_t before, int64_t span) {
      if (n + lead < end) return lead * stride;
      if (last < blocks) return (lead - count) * stride + span;
      return n + lead < w.n ? lead * stride - before : 0;
    };
    auto ahead = [&](int64_t n) {
      return Ahead{distance(n, w.stride, first * Stored<kBits>::kBytes, step * Stored<kBits>::kBytes),
                   distance(n, w.quantization.scale_stride, first / per_group, step / per_group) * size};
    };
    int64_t n = begin;
    for (; n + kRows <= end; n += kRows) strip<kBits, kRows, kCols>(span, n, ahead(n), sums + (n - begin) * kHalves);
    for (; n < end; ++n) strip<kBits, 1, 1>(span, n, ahead(n), sums + (n - begin) * kHalves);
  }
  for (int64_t i = 0; i < x.m; ++i) {
    const vf* v = sums + i * kTileRows * kHalves;
    vf folded[kTileRows];
    if constexpr (!kWholeSteps) {
      for (int64_t j = 0; j < count; ++j) folded[j] = fold(v + j * kHalves);
      v = folded;
    }
    float* totals = out.data + i * out.stride;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) sum4(v + j, totals + j);
    for (; j < count; ++j) totals[j] = sum(v[j]);
  }
}

template <int kBits>
void rows_of_width(const Matrix& w, const QuantizedRows& x, int64_t begin, int64_t end, Totals out) {
  const int64_t cols = even_cols(x.m, most_cols<kBits>(x.m));
  switch (cols) {
    case 1: return rows<kBits, 1>(w, x, begin, end, out);
    case 2: return rows<kBits, 2>(w, x, begin, end, out);
    case 3: return rows<kBits, 3>(w, x, begin, end, out);
    case 4: return rows<kBits, 4>(w, x, begin, end, out);
  }
  if constexpr (kWholeSteps) {
    if (cols == 5) return rows<kBits, 5>(w, x, begin, end, out);
    if (cols == 6) return rows<kBits, 6>(w, x, begin, end, out);
    if constexpr (kBits == 8) {
      if (cols == 8) return rows<kBits, 8>(w, x, begin, end, out);
      constexpr int kWide = kAddsAtOnce ? 4 : rows_of<kBits>(7);  // as rows_of_wide_tile() has it
      if (7 * x.c * int64_t(sizeof(int16_t)) > kStayingBytes) return rows<kBits, 7, kWide>(w, x, begin, end, out);
      return rows<kBits, 7>(w, x, begin, end, out);
    }
  }
}

}  // namespace

void QuantizedRows::panel(const Matrix& w, int64_t begin, int64_t end, Totals out) const {
  const bool bytes = w.quantization.bits == 8;
#if defined(LK_VARIANT_AVX512_AMX)
  if (tiled() > 0 && tiled() == units()) {
    if (bytes) all_tiled<8>(w, *this, begin, end, out); else all_tiled<4>(w, *this, begin, end, out);
    return;
  }
#endif
  constexpr int64_t kRows = lk::LK_VARIANT::kTileRows;
  for (; begin < end; begin += kRows, out.data += kRows) {
    const int64_t stop = begin + kRows < end ? begin + kRows : end;
    if (bytes) rows_of_width<8>(w, *this, begin, stop, out); else rows_of_width<4>(w, *this, begin, stop, out);
  }
}

}  // namespace lk::LK_VARIANT
