// A 3x3 convolution of channels_last images by Winograd's minimal filtering. A thread takes some tiles through all of it:
// their inputs transformed stay in its second-level cache, the transformed weights stream past. Neither the tiles of a
// thread nor the batch changes a bit of an image's result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

#include "../common/check.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

constexpr const char* kOp = "conv3x3";

constexpr int kTile = 4;
constexpr int kPoints = kTile + 2;
// The points are 0, +-a, +-b and infinity; all their powers below are exact in float32.
constexpr float kA = 0.625f, kA2 = kA * kA;
constexpr float kB = 1.5f, kB2 = kB * kB;

// Tiles whose products are held in registers at a time.
constexpr int kRows = 6;
// Channels in a sum that registers hold from end to end.
constexpr int64_t kDepth = 256;
// Output channels whose products are taken together, and transformed back.
constexpr int64_t kPanel = 64;
// Those of them whose transformed weights lie together: a line of the cache. Rows of a whole panel, of which a product of
// 8 lanes reads a quarter, would share a quarter of the first-level cache's sets.
constexpr int64_t kStrip = 16;
// Inputs whose filters to a strip are transformed side by side, and the number of these filters: they are written to four
// lines of the cache in a row, and not to one here and there that share its sets.
constexpr int64_t kInputs = 4;
constexpr int64_t kFilters = kInputs * kStrip;
// What channels are a multiple of.
constexpr int64_t kChannels = 16;
static_assert(kPanel % kStrip == 0 && kChannels % kStrip == 0 && kChannels % kInputs == 0);
// Bytes of transformed inputs that a thread works on, about a second-level cache, but no fewer than kTiles tiles: the fewer
// they are, the more often all weights stream past.
constexpr int64_t kBytes = 1048576;
constexpr int64_t kTiles = 24;
// Tiles whose products a gradient in the weights adds up before it goes to memory.
constexpr int64_t kChunk = 128;

struct Place {
  int64_t image, row, column;
};

struct Problem {
  const float *x, *weight, *bias;
  float* y;
  int64_t batch, in_channels, out_channels, height, width;

  int64_t rows() const { return (height + kTile - 1) / kTile; }
  int64_t columns() const { return (width + kTile - 1) / kTile; }
  int64_t tiles() const { return batch * rows() * columns(); }
  int64_t x_size() const { return height * width * in_channels; }
  int64_t y_size() const { return height * width * out_channels; }
  int64_t weight_size() const { return kPoints * kPoints * in_channels * out_channels; }

  // Numbers from a tile to the next: not a power of two, whose multiples share a few lines of the cache.
  int64_t padded_channels() const { return in_channels + kChannels; }

  Place place(int64_t tile) const {
    const int64_t inside = tile % (rows() * columns());
    return {tile / (rows() * columns()), inside / columns(), inside % columns()};
  }
};

// A matrix product out [rows][columns] = a [rows][depth] b [depth][columns], or added to what `out` holds:
//   out[i * out_row + j] = sum_n a[i * a_row + n * a_step] b[j / kStrip * b_strip + n * b_step + j % kStrip]
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step, b_strip;
  float* out;
  int64_t out_row, rows, columns, depth;
  bool add;
  // Whether to ask, on the way, for the depth * columns numbers that lie behind b's and are the next product's: weights
  // that no second-level cache holds, and that would be waited for.
  bool ahead;
};

#ifdef __x86_64__
#define CTM_FAST_WIDER_VECTORS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif
namespace lanes16 {
#define CTM_FAST_LANES 16
#define CTM_FAST_VECTORS 4
#include "winograd.h"
#undef CTM_FAST_VECTORS
#undef CTM_FAST_LANES
}  // namespace lanes16
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
namespace lanes8 {
#define CTM_FAST_LANES 8
#define CTM_FAST_VECTORS 2
#include "winograd.h"
#undef CTM_FAST_VECTORS
#undef CTM_FAST_LANES
}  // namespace lanes8
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
namespace lanes4 {
#define CTM_FAST_LANES 4
#define CTM_FAST_VECTORS 2
#include "winograd.h"
#undef CTM_FAST_VECTORS
#undef CTM_FAST_LANES
}  // namespace lanes4

// Floats in the widest vectors that this machine has and the kernel was compiled for.
int64_t widest_lanes() {
#ifdef CTM_FAST_WIDER_VECTORS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd")) {
    return 16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return 8;
  }
#endif
  return 4;
}

// The kernel for one width of vectors.
struct Kernel {
  decltype(&lanes4::convolve) convolve;
  decltype(&lanes4::read_tile) read_tile;
  decltype(&lanes4::read_gradient_tile) read_gradient_tile;
  decltype(&lanes4::multiply) multiply;
};

#define CTM_FAST_KERNEL(width) {width::convolve, width::read_tile, width::read_gradient_tile, width::multiply}

// For vectors of `lanes` floats, 0: the widest.
Kernel kernel(int64_t lanes) {
  const int64_t widest = widest_lanes();
  lanes = lanes == 0 ? widest : lanes;
  STD_TORCH_CHECK(
      (lanes == 4 || lanes == 8 || lanes == 16) && lanes <= widest, kOp, ": lanes: expected 0, 4, 8 or 16, at most ",
      widest, " on this machine, got ", lanes);
#ifdef CTM_FAST_WIDER_VECTORS
  if (lanes == 16) {
    return CTM_FAST_KERNEL(lanes16);
  }
  if (lanes == 8) {
    return CTM_FAST_KERNEL(lanes8);
  }
#endif
  return CTM_FAST_KERNEL(lanes4);
}

// Not filled, as a vector would be.
std::unique_ptr<float[]> buffer(int64_t size) { return std::unique_ptr<float[]>(new float[size]); }

int64_t divide(int64_t total, int64_t by) { return (total + by - 1) / by; }

// Deals tiles, and where these are few the output channels, out to threads.
void convolve(const Problem& problem, int64_t lanes) {
  const auto run = kernel(lanes).convolve;
  const int64_t tiles = problem.tiles(), threads = torch::stable::get_num_threads();
  const int64_t tile_size = kPoints * kPoints * problem.padded_channels();
  const int64_t fitting = kBytes / static_cast<int64_t>(sizeof(float)) / tile_size;
  const int64_t most = std::max(kTiles, fitting / kRows * kRows);
  const int64_t rounds = divide(tiles, most * threads);
  const int64_t share = divide(divide(tiles, rounds * threads), kRows) * kRows;
  const int64_t blocks = divide(tiles, share);
  const int64_t panels = divide(problem.out_channels, kPanel);
  const int64_t panel_share = divide(panels, std::min(panels, std::max<int64_t>(1, threads / blocks)));
  const int64_t groups = divide(panels, panel_share), width = panel_share * kPanel;
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = buffer(share * (tile_size + kPoints * kPoints * kPanel));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / groups, first = task % groups * width;
      run(problem, block * share, std::min(tiles, (block + 1) * share), first,
          std::min(problem.out_channels, first + width), scratch.get());
    }
  });
}

// G: the filter's polynomial at each point, over the product of that point's distances to the others.
struct Filter {
  double of[kPoints][3] = {{}, {}, {}, {}, {}, {0, 0, 1}};

  Filter() {
    const double a2 = kA2, b2 = kB2;
    const double points[] = {0, kA, -kA, kB, -kB};
    const double at_a = 2 * a2 * (a2 - b2), at_b = 2 * b2 * (b2 - a2);
    const double distances[] = {a2 * b2, at_a, at_a, at_b, at_b};
    for (int i = 0; i < kPoints - 1; ++i) {
      for (int j = 0; j < 3; ++j) {
        of[i][j] = (j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / distances[i];
      }
    }
  }
};

void check_channels(const char* name, int64_t channels) {
  STD_TORCH_CHECK(
      channels > 0 && channels % kChannels == 0, kOp, ": ", name, ": expected a multiple of ", kChannels,
      " channels, got ", channels);
}

void check_channels_last(const char* name, const Tensor& images) {
  check_dtype(kOp, name, images, ScalarType::Float);
  check_images(kOp, name, images);
  STD_TORCH_CHECK(
      is_channels_last(images), kOp, ": ", name, ": expected a channels_last tensor, got strides ",
      to_string(images.strides()));
}

// G g G^T for filters side by side; `stride` numbers between points.
CTM_FAST_WIDEST void transform_filters(const Filter& g, const double (&taps)[3][3][kFilters], float* to, int64_t stride) {
  double half[kPoints][3][kFilters];
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < 3; ++j) {
      for (int64_t k = 0; k < kFilters; ++k) {
        half[i][j][k] = g.of[i][0] * taps[0][j][k] + g.of[i][1] * taps[1][j][k] + g.of[i][2] * taps[2][j][k];
      }
    }
  }
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      float* row = to + (i * kPoints + j) * stride;
      for (int64_t k = 0; k < kFilters; ++k) {
        row[k] = static_cast<float>(g.of[j][0] * half[i][0][k] + g.of[j][1] * half[i][1][k] + g.of[j][2] * half[i][2][k]);
      }
    }
  }
}

// [K, C, 3, 3] -> [36, C, K] in the kernel's own order: by panels of outputs, then points, strips, inputs, outputs.
Tensor conv3x3_pack(const Tensor& weight) {
  check_dtype(kOp, "weight", weight, ScalarType::Float);
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, kOp,
      ": weight: expected shape [K, C, 3, 3], got ", to_string(weight.sizes()));
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  check_channels("weight", outputs);
  check_channels("weight", inputs);
  const int64_t shape[] = {kPoints * kPoints, inputs, outputs};
  Tensor packed = torch::stable::new_empty(weight, {shape, 3});
  const Filter g;
  const float* from = weight.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  const auto stride = weight.strides();
  torch::stable::parallel_for(0, outputs / kStrip * inputs / kInputs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / (inputs / kInputs) * kStrip, c = task % (inputs / kInputs) * kInputs;
      const int64_t panel = first / kPanel * kPanel, width = std::min(kPanel, outputs - panel);
      double taps[3][3][kFilters];
      for (int64_t k = 0; k < kStrip; ++k) {
        const float* filter = from + (first + k) * stride[0] + c * stride[1];
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            for (int64_t n = 0; n < kInputs; ++n) {
              taps[i][j][n * kStrip + k] = filter[n * stride[1] + i * stride[2] + j * stride[3]];
            }
          }
        }
      }
      float* strip = to + panel * kPoints * kPoints * inputs + (first - panel) * inputs;
      transform_filters(g, taps, strip + c * kStrip, inputs * width);
    }
  });
  return packed;
}

Tensor conv3x3_packed(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t lanes) {
  check_channels_last("x", x);
  check_dtype(kOp, "packed", packed, ScalarType::Float);
  check_contiguous(kOp, "packed", packed);
  const int64_t inputs = x.size(1), outputs = packed.dim() == 3 ? packed.size(2) : 0;
  const int64_t shape[] = {kPoints * kPoints, inputs, outputs};
  check_shape(kOp, "packed", packed, {shape, 3});
  check_channels("x", inputs);
  check_channels("packed", outputs);
  if (bias) {
    check_dtype(kOp, "bias", *bias, ScalarType::Float);
    check_shape(kOp, "bias", *bias, {&outputs, 1});
    check_contiguous(kOp, "bias", *bias);
  }
  const int64_t size[] = {x.size(0), outputs, x.size(2), x.size(3)};
  Tensor y = torch::stable::empty(
      {size, 4}, ScalarType::Float, std::nullopt, x.device(), std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  if (y.numel() > 0) {
    convolve(
        {x.const_data_ptr<float>(), packed.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
         y.mutable_data_ptr<float>(), x.size(0), inputs, outputs, x.size(2), x.size(3)},
        lanes);
  }
  return y;
}

// G^T u G for `width` filters side by side; `stride` numbers between points.
CTM_FAST_WIDEST void transform_points(
    const Filter& g, const float* u, int64_t stride, int64_t width, double (&taps)[3][3][kPanel]) {
  double half[3][kPoints][kPanel] = {};
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      const float* row = u + (i * kPoints + j) * stride;
      for (int tap = 0; tap < 3; ++tap) {
        for (int64_t k = 0; k < width; ++k) {
          half[tap][j][k] += g.of[i][tap] * row[k];
        }
      }
    }
  }
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      double sum[kPanel] = {};
      for (int point = 0; point < kPoints; ++point) {
        for (int64_t k = 0; k < width; ++k) {
          sum[k] += g.of[point][j] * half[i][point][k];
        }
      }
      std::copy(sum, sum + width, taps[i][j]);
    }
  }
}

// The gradient of each filter, [K, 3, 3, C], from those at the points, u [36][C][K].
void transform_back(const float* u, int64_t inputs, int64_t outputs, float* to) {
  const Filter g;
  torch::stable::parallel_for(0, divide(outputs, kPanel) * inputs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / inputs * kPanel, c = task % inputs, panel = std::min(kPanel, outputs - first);
      double taps[3][3][kPanel];
      transform_points(g, u + c * outputs + first, inputs * outputs, panel, taps);
      for (int64_t k = 0; k < panel; ++k) {
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            to[(((first + k) * 3 + i) * 3 + j) * inputs + c] = static_cast<float>(taps[i][j][k]);
          }
        }
      }
    }
  });
}

// [K, C, 3, 3] float32 laid out as channels_last weights are.
Tensor conv3x3_weight_grad(const Tensor& grad, const Tensor& x, int64_t lanes) {
  check_channels_last("grad", grad);
  check_channels_last("x", x);
  const int64_t inputs = x.size(1), outputs = grad.size(1), height = x.size(2), width = x.size(3);
  const int64_t size[] = {x.size(0), outputs, height, width};
  check_shape(kOp, "grad", grad, {size, 4});
  check_channels("x", inputs);
  check_channels("grad", outputs);
  const Kernel run = kernel(lanes);
  const Problem problem{x.const_data_ptr<float>(), nullptr, nullptr, nullptr, x.size(0), inputs, outputs, height, width};
  const float* gradients = grad.const_data_ptr<float>();
  const int64_t points = kPoints * kPoints, tiles = problem.tiles(), chunk = std::min(tiles, kChunk);
  const int64_t v_stride = inputs + kChannels, z_stride = outputs + kChannels;
  const int64_t shape[] = {points, inputs, outputs};
  Tensor transformed = torch::stable::new_empty(x, {shape, 3});
  float* u = transformed.mutable_data_ptr<float>();
  if (tiles == 0) {
    std::fill(u, u + points * inputs * outputs, 0.0f);
  }
  const auto v = buffer(points * chunk * v_stride), z = buffer(points * chunk * z_stride);
  for (int64_t first = 0; first < tiles; first += chunk) {
    const int64_t count = std::min(chunk, tiles - first);
    torch::stable::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Place tile = problem.place(first + i);
        run.read_tile(problem, tile, v.get() + i * v_stride, chunk * v_stride);
        run.read_gradient_tile(problem, gradients, tile, z.get() + i * z_stride, chunk * z_stride);
      }
    });
    torch::stable::parallel_for(0, points, 1, [&](int64_t begin, int64_t end) {
      for (int64_t point = begin; point < end; ++point) {
        run.multiply(
            {v.get() + point * chunk * v_stride, 1, v_stride, z.get() + point * chunk * z_stride, z_stride,
             kStrip, u + point * inputs * outputs, outputs, inputs, outputs, count, first > 0, false});
      }
    });
  }
  const int64_t weight_size[] = {outputs, inputs, 3, 3};
  Tensor weight_grad = torch::stable::empty(
      {weight_size, 4}, ScalarType::Float, std::nullopt, x.device(), std::nullopt,
      torch::headeronly::MemoryFormat::ChannelsLast);
  transform_back(u, inputs, outputs, weight_grad.mutable_data_ptr<float>());
  return weight_grad;
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_channels_last("x", x);
  const int64_t shape[] = {weight.size(0), x.size(1), 3, 3};
  check_shape(kOp, "weight", weight, {shape, 4});
  return conv3x3_packed(x, conv3x3_pack(weight), bias, 0);
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack));
  m.impl("conv3x3_packed", TORCH_BOX(&conv3x3_packed));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&conv3x3_weight_grad));
}

}  // namespace
}  // namespace ctm_fast::cpu
