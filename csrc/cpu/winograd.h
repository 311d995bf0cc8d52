// F(4x4, 3x3) of Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308): 16 neighbouring outputs of a 3x3
// convolution from 36 inputs and 36 products in place of 144,
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A
//
// and the gradient in g from the same: dg = G^T [ (A dY A^T) . (B^T d B) ] G, summed over tiles;
// with the polynomials evaluated at 0, +-5/8, +-3/2 and infinity. At these points float32 loses 1.6 times what a direct
// convolution loses; at the usual 0, +-1, +-2 it is 3.5 times (root mean square, 256 channels).
//
// This file has no guard: conv3x3.cpp includes it once for each width of vectors, in a namespace of its own, with
//   CTM_FAST_LANES    floats in a vector
//   CTM_FAST_VECTORS  vectors of outputs that a product holds in registers for each of kRows rows
typedef float Lanes __attribute__((vector_size(CTM_FAST_LANES * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(CTM_FAST_LANES * sizeof(float)), aligned(4), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Lanes value) { *reinterpret_cast<Unaligned*>(to) = value; }

// B^T d: one column of inputs.
inline void transform_input(const Lanes (&d)[kPoints], Lanes (&out)[kPoints]) {
  const Lanes even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const Lanes even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  out[0] = kA2 * kB2 * d[0] - (kA2 + kB2) * d[2] + d[4];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = kA2 * kB2 * d[1] - (kA2 + kB2) * d[3] + d[5];
}

// A^T m: one column of products.
inline void transform_output(const Lanes (&m)[kPoints], Lanes (&out)[kTile]) {
  const Lanes sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Lanes sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  out[0] = m[0] + sum_a + sum_b;
  out[1] = kA * difference_a + kB * difference_b;
  out[2] = kA2 * sum_a + kB2 * sum_b;
  out[3] = kA * kA2 * difference_a + kB * kB2 * difference_b + m[5];
}

// A y: one column of gradients.
inline void transform_gradient(const Lanes (&y)[kTile], Lanes (&out)[kPoints]) {
  const Lanes even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const Lanes even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  out[0] = y[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = y[3];
}

// The 6x6 inputs of a tile, all channels, [36][channels] with `stride` numbers between points.
inline void read_tile(const Problem& problem, Place tile, float* out, int64_t stride) {
  const int64_t top = tile.row * kTile - 1, left = tile.column * kTile - 1, channels = problem.in_channels;
  const float* x = problem.x + tile.image * problem.x_size();
  for (int64_t c = 0; c < channels; c += CTM_FAST_LANES) {
    Lanes half[kPoints][kPoints];
    for (int j = 0; j < kPoints; ++j) {
      Lanes d[kPoints], column[kPoints];
      for (int i = 0; i < kPoints; ++i) {
        const int64_t row = top + i, pixel = left + j;
        const bool inside = row >= 0 && row < problem.height && pixel >= 0 && pixel < problem.width;
        d[i] = inside ? load(x + (row * problem.width + pixel) * channels + c) : Lanes{};
      }
      transform_input(d, column);
      for (int i = 0; i < kPoints; ++i) {
        half[i][j] = column[i];
      }
    }
    for (int i = 0; i < kPoints; ++i) {
      Lanes row[kPoints];
      transform_input(half[i], row);
      for (int j = 0; j < kPoints; ++j) {
        store(out + (i * kPoints + j) * stride + c, row[j]);
      }
    }
  }
}

// The 6x6 transforms of a tile's 4x4 gradients, all channels, laid out likewise; beyond the image they are 0.
inline void read_gradient_tile(const Problem& problem, const float* grad, Place tile, float* out, int64_t stride) {
  const int64_t top = tile.row * kTile, left = tile.column * kTile, channels = problem.out_channels;
  grad += tile.image * problem.y_size();
  for (int64_t k = 0; k < channels; k += CTM_FAST_LANES) {
    Lanes half[kPoints][kTile];
    for (int j = 0; j < kTile; ++j) {
      Lanes y[kTile], column[kPoints];
      for (int i = 0; i < kTile; ++i) {
        const bool inside = top + i < problem.height && left + j < problem.width;
        y[i] = inside ? load(grad + ((top + i) * problem.width + left + j) * channels + k) : Lanes{};
      }
      transform_gradient(y, column);
      for (int i = 0; i < kPoints; ++i) {
        half[i][j] = column[i];
      }
    }
    for (int i = 0; i < kPoints; ++i) {
      Lanes row[kPoints];
      transform_gradient(half[i], row);
      for (int j = 0; j < kPoints; ++j) {
        store(out + (i * kPoints + j) * stride + k, row[j]);
      }
    }
  }
}

// The 4x4 outputs of a tile, as many as lie in the image, for `width` channels from `first` on, out of [36][width] with
// `stride` numbers between points.
inline void write_tile(
    const Problem& problem, const float* m, int64_t stride, Place tile, int64_t first, int64_t width) {
  float* y = problem.y + tile.image * problem.y_size();
  const int64_t top = tile.row * kTile, left = tile.column * kTile;
  const int64_t rows = std::min<int64_t>(kTile, problem.height - top);
  const int64_t columns = std::min<int64_t>(kTile, problem.width - left);
  for (int64_t c = 0; c < width; c += CTM_FAST_LANES) {
    Lanes half[kTile][kPoints];
    for (int j = 0; j < kPoints; ++j) {
      Lanes products[kPoints], column[kTile];
      for (int i = 0; i < kPoints; ++i) {
        products[i] = load(m + (i * kPoints + j) * stride + c);
      }
      transform_output(products, column);
      for (int i = 0; i < kTile; ++i) {
        half[i][j] = column[i];
      }
    }
    const Lanes offset = problem.bias ? load(problem.bias + first + c) : Lanes{};
    for (int64_t i = 0; i < rows; ++i) {
      Lanes row[kTile];
      transform_output(half[i], row);
      float* pixels = y + ((top + i) * problem.width + left) * problem.out_channels + first + c;
      for (int64_t j = 0; j < columns; ++j) {
        store(pixels + j * problem.out_channels, row[j] + offset);
      }
    }
  }
}

// Where column j of a product is, from where its b is.
inline int64_t strip(const Product& p, int64_t column) { return column / kStrip * p.b_strip + column % kStrip; }

// out [rows][vectors] = a b for as many as registers hold, or added to what `out` holds. Sums of kDepth numbers are added
// up: the error of one sum over all grows with the root of their number. `ahead`: see Product.
template <int rows, int vectors, bool ahead>
void product(const Product& p, const float* a, const float* b, float* out) {
  for (int64_t first = 0; first < p.depth; first += kDepth) {
    Lanes sum[rows][vectors] = {};
    const int64_t last = std::min(p.depth, first + kDepth);
#pragma GCC unroll 4
    for (int64_t n = first; n < last; ++n) {
      if constexpr (ahead) {
        for (int64_t j = 0; j < vectors * CTM_FAST_LANES; j += kStrip) {
          __builtin_prefetch(b + strip(p, j) + n * p.b_step + p.depth * p.columns, 0, 2);
        }
      }
      Lanes right[vectors];
      for (int j = 0; j < vectors; ++j) {
        right[j] = load(b + strip(p, j * CTM_FAST_LANES) + n * p.b_step);
      }
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < vectors; ++j) {
          sum[i][j] += a[i * p.a_row + n * p.a_step] * right[j];
        }
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) {
        float* to = out + i * p.out_row + j * CTM_FAST_LANES;
        store(to, p.add || first > 0 ? load(to) + sum[i][j] : sum[i][j]);
      }
    }
  }
}

template <int vectors, bool ahead>
void product_of_rows(const Product& p, int64_t rows, const float* a, const float* b, float* out) {
  static_assert(kRows == 6);
  switch (rows) {
    case 6:
      return product<6, vectors, ahead>(p, a, b, out);
    case 5:
      return product<5, vectors, ahead>(p, a, b, out);
    case 4:
      return product<4, vectors, ahead>(p, a, b, out);
    case 3:
      return product<3, vectors, ahead>(p, a, b, out);
    case 2:
      return product<2, vectors, ahead>(p, a, b, out);
    case 1:
      return product<1, vectors, ahead>(p, a, b, out);
  }
}

// The first rows ask ahead, the others would only ask again.
template <int vectors>
void product_of_columns(const Product& p, int64_t column) {
  const float* b = p.b + strip(p, column);
  for (int64_t row = 0; row < p.rows; row += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, p.rows - row);
    const float* a = p.a + row * p.a_row;
    float* out = p.out + row * p.out_row + column;
    if (p.ahead && row == 0) {
      product_of_rows<vectors, true>(p, rows, a, b, out);
    } else {
      product_of_rows<vectors, false>(p, rows, a, b, out);
    }
  }
}

// CTM_FAST_VECTORS vectors of columns at a time, and what is left of them.
void multiply(const Product& p) {
  constexpr int vectors = CTM_FAST_VECTORS, width = vectors * CTM_FAST_LANES;
  static_assert(width % kStrip == 0 || kStrip % width == 0);
  int64_t column = 0;
  for (; column + width <= p.columns; column += width) {
    product_of_columns<vectors>(p, column);
  }
  switch ((p.columns - column) / CTM_FAST_LANES) {
    case 3:
      return product_of_columns<3>(p, column);
    case 2:
      return product_of_columns<2>(p, column);
    case 1:
      return product_of_columns<1>(p, column);
  }
}

// Output channels [first, last), panel by panel, of the tiles [begin, end) of the batch.
void convolve(const Problem& problem, int64_t begin, int64_t end, int64_t first, int64_t last, float* scratch) {
  const int64_t tiles = end - begin, channels = problem.in_channels, v_stride = problem.padded_channels();
  float* v = scratch;
  float* m = scratch + kPoints * kPoints * tiles * v_stride;
  const bool ahead = problem.weight_size() * static_cast<int64_t>(sizeof(float)) > kBytes;
  for (int64_t i = 0; i < tiles; ++i) {
    read_tile(problem, problem.place(begin + i), v + i * v_stride, tiles * v_stride);
  }
  for (; first < last; first += kPanel) {
    const int64_t width = std::min(kPanel, last - first);
    const float* u = problem.weight + first * kPoints * kPoints * channels;
    for (int64_t point = 0; point < kPoints * kPoints; ++point) {
      multiply(
          {v + point * tiles * v_stride, v_stride, 1, u + point * channels * width, kStrip, channels * kStrip,
           m + point * tiles * width, width, tiles, width, channels, false, ahead});
    }
    for (int64_t i = 0; i < tiles; ++i) {
      write_tile(problem, m + i * width, tiles * width, problem.place(begin + i), first, width);
    }
  }
}
