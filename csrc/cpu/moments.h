// Mean and squared deviations of columns of numbers, for statistics that hold for data far from zero too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "widest.h"

namespace ctm_fast::cpu {

// Rows whose deviations are taken from their own mean before tiles are put together: two tiles of 256 columns stay in
// the first-level cache.
constexpr int64_t kTileRows = 16;
// Columns at a time: their sums stay in registers or next to them.
constexpr int64_t kColumns = 64;

// Asks for rows that are read next, past the end perhaps, which does no harm: several rows at once, at a distance from
// each other, are more than the machine foresees. Without it the first pass over an image took twice as long.
template <typename T>
inline void prefetch_rows(const T* x, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; i += kLine) {
      __builtin_prefetch(x + row * stride + i);
    }
  }
}

// Adds rows * width numbers, at x[row * stride + column], to the moments of each column: its mean, and its squared
// deviations from it; `before` numbers of each are in them already. Two passes over each tile (mean, deviations), and
//   mean += delta n / (before + n),   squares += squares of the tile + delta^2 before n / (before + n)
// (Chan, Golub, LeVeque 1979), in float64, over the tiles. The order of every sum is fixed here, not by the vectors.
template <typename T>
CTM_FAST_WIDEST void add_moments(
    const T* __restrict__ x, int64_t rows, int64_t width, int64_t stride, int64_t before, double* __restrict__ means,
    double* __restrict__ squares) {
  const auto at = [=](const T* pointer, int64_t row) { return static_cast<float>(pointer[row * stride]); };
  for (int64_t begin = 0; begin < rows; begin += kTileRows) {
    const int64_t tile = std::min(kTileRows, rows - begin);
    const float size = static_cast<float>(tile);
    const double n = static_cast<double>(tile);
    const double count = static_cast<double>(before + begin);
    const double share = n / (count + n);
    for (int64_t first = 0; first < width; first += kColumns) {
      const int64_t columns = std::min(kColumns, width - first);
      const T* origin = x + begin * stride + first;
      float sum[kColumns] = {};
      int64_t row = 0;
      for (; row + 8 <= tile; row += 8) {
        const T* p = origin + row * stride;
        for (int64_t i = 0; i < columns; ++i) {
          sum[i] += ((at(p + i, 0) + at(p + i, 1)) + (at(p + i, 2) + at(p + i, 3))) +
                    ((at(p + i, 4) + at(p + i, 5)) + (at(p + i, 6) + at(p + i, 7)));
        }
      }
      for (; row < tile; ++row) {
        for (int64_t i = 0; i < columns; ++i) {
          sum[i] += at(origin + i, row);
        }
      }
      float center[kColumns];  // the tile's mean but for rounding; what that lost is in the sum of the deviations
      for (int64_t i = 0; i < columns; ++i) {
        center[i] = sum[i] / size;
      }
      float deviation[kColumns] = {};
      float square[kColumns] = {};
      for (row = 0; row + 4 <= tile; row += 4) {
        const T* p = origin + row * stride;
        prefetch_rows(p + kTileRows * stride, 4, columns, stride);
        for (int64_t i = 0; i < columns; ++i) {
          const float a = at(p + i, 0) - center[i], b = at(p + i, 1) - center[i];
          const float c = at(p + i, 2) - center[i], d = at(p + i, 3) - center[i];
          deviation[i] += (a + b) + (c + d);
          square[i] += fmaf(a, a, b * b) + fmaf(c, c, d * d);
        }
      }
      for (; row < tile; ++row) {
        for (int64_t i = 0; i < columns; ++i) {
          const float a = at(origin + i, row) - center[i];
          deviation[i] += a;
          square[i] = fmaf(a, a, square[i]);
        }
      }
      for (int64_t i = 0; i < columns; ++i) {
        const double lost = deviation[i] / n;
        const double delta = (center[i] + lost) - means[first + i];
        means[first + i] += delta * share;
        squares[first + i] += (square[i] - deviation[i] * lost) + delta * delta * (count * share);
      }
    }
  }
}

}  // namespace ctm_fast::cpu
