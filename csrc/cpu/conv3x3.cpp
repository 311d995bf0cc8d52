// A 3x3 convolution of channels_last images by Winograd's minimal filtering. A thread takes some tiles through all of it:
// their inputs transformed stay in its second-level cache, the transformed weights stream past. Neither the tiles of a
// thread nor the batch changes a bit of an image's result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/check.h"

namespace ctm_fast::cpu {
namespace {

constexpr int kTile = 4;
constexpr int kPoints = kTile + 2;
// The points are 0, +-a, +-b and infinity; all their powers below are exact in float32.
constexpr float kA = 0.625f, kA2 = kA * kA;
constexpr float kB = 1.5f, kB2 = kB * kB;

// Tiles whose products are held in registers at a time.
constexpr int kRows = 6;
// Output channels whose transformed weights lie together.
constexpr int64_t kPanel = 64;
// What channels are a multiple of.
constexpr int64_t kChannels = 16;
// Bytes of transformed inputs that a thread works on: they and the products fit into a small second-level cache.
constexpr int64_t kBytes = 262144;

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

  // Numbers from a tile to the next: not a power of two, whose multiples share a few lines of the cache.
  int64_t padded_channels() const { return in_channels + kChannels; }

  Place place(int64_t tile) const {
    const int64_t inside = tile % (rows() * columns());
    return {tile / (rows() * columns()), inside / columns(), inside % columns()};
  }
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

using Convolve = void(const Problem&, int64_t, int64_t, int64_t, int64_t, float*);

// For vectors of `lanes` floats, 0: the widest.
Convolve* kernel(int64_t lanes) {
  const int64_t widest = widest_lanes();
  lanes = lanes == 0 ? widest : lanes;
  STD_TORCH_CHECK(
      (lanes == 4 || lanes == 8 || lanes == 16) && lanes <= widest, "conv3x3: lanes: expected 0, 4, 8 or 16, at most ",
      widest, " on this machine, got ", lanes);
#ifdef CTM_FAST_WIDER_VECTORS
  if (lanes > 4) {
    return lanes == 16 ? lanes16::convolve : lanes8::convolve;
  }
#endif
  return lanes4::convolve;
}

int64_t divide(int64_t total, int64_t by) { return (total + by - 1) / by; }

// Deals tiles, and where these are few the output channels, out to threads.
void convolve(const Problem& problem, int64_t lanes) {
  Convolve* const run = kernel(lanes);
  const int64_t tiles = problem.tiles(), threads = torch::stable::get_num_threads();
  const int64_t tile_size = kPoints * kPoints * problem.padded_channels();
  const int64_t most = std::max<int64_t>(1, kBytes / static_cast<int64_t>(sizeof(float)) / tile_size / kRows) * kRows;
  const int64_t rounds = divide(tiles, most * threads);
  const int64_t share = divide(divide(tiles, rounds * threads), kRows) * kRows;
  const int64_t blocks = divide(tiles, share);
  const int64_t panels = divide(problem.out_channels, kPanel);
  const int64_t groups = std::min(panels, std::max<int64_t>(1, threads / blocks));
  const int64_t width = divide(panels, groups) * kPanel;
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(share * (tile_size + kPoints * kPoints * kPanel));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / groups, first = task % groups * width;
      run(problem, block * share, std::min(tiles, (block + 1) * share), first,
          std::min(problem.out_channels, first + width), scratch.data());
    }
  });
}

constexpr const char* kOp = "conv3x3";

void check_channels(const char* name, int64_t channels) {
  STD_TORCH_CHECK(
      channels > 0 && channels % kChannels == 0, kOp, ": ", name, ": expected a multiple of ", kChannels,
      " channels, got ", channels);
}

// [K, C, 3, 3] -> [36, C, K] in the kernel's own order: by panels of outputs, then points, inputs, outputs.
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
  const double a2 = kA2, b2 = kB2;
  const double points[] = {0, kA, -kA, kB, -kB};
  const double divisors[] = {a2 * b2, 2 * a2 * (a2 - b2), 2 * a2 * (a2 - b2), 2 * b2 * (b2 - a2), 2 * b2 * (b2 - a2)};
  double g[kPoints][3] = {{}, {}, {}, {}, {}, {0, 0, 1}};
  for (int i = 0; i < kPoints - 1; ++i) {
    for (int j = 0; j < 3; ++j) {
      g[i][j] = (j == 0 ? 1 : j == 1 ? points[i] : points[i] * points[i]) / divisors[i];
    }
  }
  const float* from = weight.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  const auto stride = weight.strides();
  torch::stable::parallel_for(0, divide(outputs, kPanel) * inputs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / inputs * kPanel, c = task % inputs, width = std::min(kPanel, outputs - first);
      double taps[3][3][kPanel], half[kPoints][3][kPanel];
      for (int64_t k = 0; k < width; ++k) {
        const float* filter = from + (first + k) * stride[0] + c * stride[1];
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            taps[i][j][k] = filter[i * stride[2] + j * stride[3]];
          }
        }
      }
      for (int i = 0; i < kPoints; ++i) {
        for (int j = 0; j < 3; ++j) {
          for (int64_t k = 0; k < width; ++k) {
            half[i][j][k] = g[i][0] * taps[0][j][k] + g[i][1] * taps[1][j][k] + g[i][2] * taps[2][j][k];
          }
        }
      }
      float* panel = to + first * kPoints * kPoints * inputs + c * width;
      for (int i = 0; i < kPoints; ++i) {
        for (int j = 0; j < kPoints; ++j) {
          float* row = panel + (i * kPoints + j) * inputs * width;
          for (int64_t k = 0; k < width; ++k) {
            row[k] = static_cast<float>(g[j][0] * half[i][0][k] + g[j][1] * half[i][1][k] + g[j][2] * half[i][2][k]);
          }
        }
      }
    }
  });
  return packed;
}

Tensor conv3x3_packed(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t lanes) {
  check_dtype(kOp, "x", x, ScalarType::Float);
  check_images(kOp, "x", x);
  STD_TORCH_CHECK(
      is_channels_last(x), kOp, ": x: expected a channels_last tensor, got strides ", to_string(x.strides()));
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

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return conv3x3_packed(x, conv3x3_pack(weight), bias, 0);
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack));
  m.impl("conv3x3_packed", TORCH_BOX(&conv3x3_packed));
}

}  // namespace
}  // namespace ctm_fast::cpu
