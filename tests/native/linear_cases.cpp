// rms_norm, small_linear, quantize: each row of a batch, strided, against the row alone.
#include "check.h"
#include "cpu/quantized_unit.h"

namespace {

template <class T>
void norm(int num_threads) {
  for (int64_t c : {1, 7, 16, 83, 769, 5125}) {
    const int64_t m = 5, stride = c + 3;
    const auto x = random_buffer<T>(span(m, stride, c), 1), weight = random_buffer<T>(c, 2, 0.2f, 1);
    const auto before = random_buffer<T>(span(m, stride, c), 3);
    Buffer<T> residual(before), out(span(m, stride, c));
    lk::rms_norm({x, stride, weight, residual, stride, out, stride, m, c, 1e-5f, dtype_of<T>, num_threads});
    for (int64_t row = 0; row < m; ++row) {
      Buffer<T> alone(c), alone_residual(c);
      memcpy(alone_residual, before + row * stride, size_t(c) * sizeof(T));
      lk::rms_norm({x + row * stride, c, weight, alone_residual, c, alone, c, 1, c, 1e-5f, dtype_of<T>, 1});
      expect(same<T>(alone, out + row * stride, c), "rms_norm row", int(dtype_of<T>), m, c, row);
      expect(same<T>(alone_residual, residual + row * stride, c), "rms_norm residual", int(dtype_of<T>), m, c, row);
    }
  }
}

template <class T>
void linear(int num_threads) {
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 33, 83}, {5, 70, 769}, {66, 25, 40}, {3, 130, 64}, {6, 53, 1500}, {8, 27, 1030},
                              {50, 83, 70}, {33, 20, 96}};
  for (const auto& [m, n, c] : shapes) {
    const int64_t stride = c + 1, out_stride = n + 2;
    const auto x = random_buffer<T>(span(m, stride, c), 4), w = random_buffer<T>(span(n, stride, c), 5, 0.2f);
    const auto second = random_buffer<T>(3 * c, 6), bias = random_buffer<T>(n, 7), norm = random_buffer<T>(c, 8);
    const auto residual = random_buffer<T>(span(m, out_stride, n), 9);
    Buffer<T> y(span(m, out_stride, n)), z(m * 3), sums(residual);
    const lk::LinearWeight weights[] = {{w, stride, n, bias, y, out_stride}, {second, c, 3, nullptr, z, 3}};
    const lk::LinearWeight added = {w, stride, n, bias, sums, out_stride};
    lk::small_linear({x, stride, m, c, weights, 2, norm, 1e-5f, nullptr, 0, dtype_of<T>, num_threads});
    lk::small_linear({x, stride, m, c, &added, 1, nullptr, 0, sums, out_stride, dtype_of<T>, num_threads});
    for (int64_t row = 0; row < m; ++row) {
      Buffer<T> one(n), two(3), sum(n);
      const lk::LinearWeight alone[] = {{w, stride, n, bias, one, n}, {second, c, 3, nullptr, two, 3}};
      const lk::LinearWeight alone_added = {w, stride, n, bias, sum, n};
      lk::small_linear({x + row * stride, c, 1, c, alone, 2, norm, 1e-5f, nullptr, 0, dtype_of<T>, 1});
      lk::small_linear({x + row * stride, c, 1, c, &alone_added, 1, nullptr, 0, residual + row * out_stride, n,
                        dtype_of<T>, 1});
      expect(same<T>(one, y + row * out_stride, n) && same<T>(two, z + row * 3, 3), "small_linear row",
             int(dtype_of<T>), m, n, c);
      expect(same<T>(sum, sums + row * out_stride, n), "small_linear residual", int(dtype_of<T>), m, n, c);
    }
  }
}

// What a quantized row of c columns has in column i.
int number(const uint8_t* row, int64_t bits, int64_t i, int64_t c) {
  const lk::LK_VARIANT::Unit unit = lk::LK_VARIANT::unit_of(i / 64, c / 64);
  const int64_t within = i - unit.first * 64, lane = within / (4 * unit.blocks), step = within / 4 % unit.blocks;
  const auto nibble = [](uint8_t byte, int64_t high) { return (high ? byte >> 4 : byte & 15) - 8; };
  if (unit.blocks == 1) return bits == 8 ? int8_t(row[i]) : nibble(row[i / 2], i % 2);
  if (bits == 8) return int8_t(row[unit.first * 64 + step * 64 + lane * 4 + i % 4]);
  return nibble(row[unit.first * 32 + step / 2 * 64 + lane * 4 + i % 4], step % 2);
}

template <class T>
void quantized_linear(int num_threads) {
  const int64_t shapes[][3] = {{1, 1, 2}, {7, 33, 84}, {5, 70, 1090}, {66, 25, 40}, {3, 130, 1984}, {18, 37, 1090}, {33, 20, 2048}};
  for (const auto& [m, n, c] : shapes)
    for (int64_t bits : {8, 4}) {
      const int64_t stride = c + 1;
      const auto x = random_buffer<T>(span(m, stride, c), 4), bias = random_buffer<T>(n, 7), norm = random_buffer<T>(c, 8);
      const Quantized w(n, c, bits, 64, false, 5), second(3, c, bits, 128, true, 9);
      Buffer<T> y(m * n), z(m * 3);
      const lk::LinearWeight weights[] = {{w.values, w.stride, n, bias, y, n, w.format},
                                          {second.values, second.stride, 3, nullptr, z, 3, second.format}};
      lk::small_linear({x, stride, m, c, weights, 2, norm, 1e-5f, nullptr, 0, dtype_of<T>, num_threads});
      for (int64_t row = 0; row < m; ++row) {
        Buffer<T> one(n), two(3);
        const lk::LinearWeight alone[] = {{w.values, w.stride, n, bias, one, n, w.format},
                                          {second.values, second.stride, 3, nullptr, two, 3, second.format}};
        lk::small_linear({x + row * stride, c, 1, c, alone, 2, norm, 1e-5f, nullptr, 0, dtype_of<T>, 1});
        expect(same<T>(one, y + row * n, n) && same<T>(two, z + row * 3, 3), "quantized small_linear row",
               int(dtype_of<T>), m, n, bits);
      }
      // With every q, scale and x a whole number the product is one too, whatever the variant.
      Quantized whole(n, c, bits, 64, true, 5);
      whole.scale.fill(2), whole.offset.fill(3);
      Buffer<T> ones(c), sums(n);
      ones.fill(lk::from_float<T>(1));
      Buffer<float> wide(c), exact(n);
      wide.fill(1);
      const lk::LinearWeight rounded = {whole.values, whole.stride, n, nullptr, sums, n, whole.format};
      const lk::LinearWeight plain = {whole.values, whole.stride, n, nullptr, exact, n, whole.format};
      lk::small_linear({ones, c, 1, c, &rounded, 1, nullptr, 0, nullptr, 0, dtype_of<T>, num_threads});
      lk::small_linear({wide, c, 1, c, &plain, 1, nullptr, 0, nullptr, 0, lk::DType::f32, num_threads});
      for (int64_t i = 0; i < n; ++i) {
        int64_t sum = 0;
        for (int64_t j = 0; j < c; ++j) {
          sum += 2 * number(whole.values + i * whole.stride, bits, j, c) + 3;
        }
        const T expected = lk::from_float<T>(float(sum));
        expect(exact[i] == float(sum) && same<T>(&expected, sums + i, 1), "quantized sum", int(dtype_of<T>), n, c, bits);
      }
    }
}

template <class T>
void quantized_weight(int num_threads) {
  const int64_t shapes[][3] = {{1, 2, 64}, {5, 84, 64}, {70, 1090, 128}, {3, 300, 4096}, {2, 2018, 64}};
  for (const auto& [n, c, group] : shapes)
    for (int64_t bits : {8, 4}) {
      const int64_t stride = c + 1, bytes = c * bits / 8, groups = (c + group - 1) / group;
      auto w = random_buffer<T>(span(n, stride, c), 4);
      memset(w + (n - 1) * stride, 0, size_t(c) * sizeof(T));
      Buffer<uint8_t> values(n * bytes), one(bytes);
      Buffer<lk::bf16> scale(n * groups), one_scale(groups);
      Buffer<float> error(n), norm(n);
      int64_t bad_row = -1;
      lk::quantize({w, stride, bits, group, values, scale, error, norm, &bad_row, n, c, dtype_of<T>, num_threads});
      expect(bad_row == n, "quantize: all rows are finite", int(dtype_of<T>), n, c, bits);
      for (int64_t row = 0; row < n; ++row) {
        const T* x = w + row * stride;
        lk::quantize({x, c, bits, group, one, one_scale, nullptr, nullptr, &bad_row, 1, c, dtype_of<T>, 1});
        expect(same<uint8_t>(one, values + row * bytes, bytes) && same<lk::bf16>(one_scale, scale + row * groups, groups),
               "quantize row", int(dtype_of<T>), n, c, bits);
        double lost = 0, all = 0;
        bool near = true;
        for (int64_t i = 0; i < c; ++i) {
          const int q = number(one, bits, i, c);
          const float step = lk::to_float(one_scale[i / group]), v = lk::to_float(x[i]), e = v - float(q) * step;
          near = near && std::fabs(e) <= std::fabs(step) * (q == 7 && bits == 4 ? 1.02f : 0.501f);
          lost += double(e) * e, all += double(v) * v;
        }
        expect(near, "quantize: nearest value", int(dtype_of<T>), n, c, bits);
        expect(std::fabs(error[row] - std::sqrt(lost)) <= 1e-5 * std::sqrt(lost) &&
                   std::fabs(norm[row] - std::sqrt(all)) <= 1e-5 * std::sqrt(all),
               "quantize norms", int(dtype_of<T>), n, c, bits);
      }
      for (int64_t row : {n - 1, n / 2}) {
        w[row * stride + c - 1] = lk::from_float<T>(row == n - 1 ? NAN : INFINITY);
        lk::quantize({w, stride, bits, group, values, scale, error, norm, &bad_row, n, c, dtype_of<T>, num_threads});
        expect(bad_row == row, "quantize: first row that is not finite", int(dtype_of<T>), n, c, bits);
      }
    }
}

}  // namespace

void check_quantize(int num_threads) { FOR_EVERY_DTYPE(quantized_weight, num_threads); }
void check_rms_norm(int num_threads) { FOR_EVERY_DTYPE(norm, num_threads); }
void check_small_linear(int num_threads) {
  FOR_EVERY_DTYPE(linear, num_threads);
  FOR_EVERY_DTYPE(quantized_linear, num_threads);
}
