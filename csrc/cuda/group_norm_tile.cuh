// group_norm_silu in one launch: a block reads whole groups of an image once, into shared memory, and works from there.
#pragma once

#include <numeric>
#include <optional>

#include "group_norm_affine.cuh"

namespace ctm_fast::cuda {
namespace {

// Shared memory of a block at most. Planned are two blocks on a multiprocessor of sm_80 (164 KiB, of which each block
// costs one more), sm_90 and sm_100 (228 KiB); three, as the registers allow, where tiles are smaller. While one adds up
// or stores, the others load.
constexpr size_t kTileShared = 81 << 10;

// Bytes of a pixel that a tile covers in channels_last: what it is widened to if it fits, and the least, one sector.
constexpr int64_t kTileWide = 64;
constexpr int64_t kTileNarrow = 32;

// What a block keeps of each channel of its tile, or of each group.
enum TileRow { kTileCentre, kTileGain, kTileOffset, kTileMean, kTileRows };

// One image x `run` channels, whole groups and whole vectors, x all pixels; an image's last tile may have fewer.
// `plan` says which thread owns which vectors, and no other touches them. In channels_last they are of the same N
// channels. Otherwise they are of one group, a power of two threads to a group, and to the plan a group is one channel.
struct Tile {
  Plan plan;
  int64_t channels;  // of the image
  int64_t groups;    // of the image
  int width;         // channels of a group
  int pixels;
  int run;

  // The first channel, of the image, of the tile of this block, and how many groups it has.
  __device__ int64_t first() const { return blockIdx.x % plan.blocks * run; }
  __device__ int count() const {
    return static_cast<int>((first() + run < channels ? run : channels - first()) / width);
  }
};

// Floats in which the threads leave one sum of each of their channels.
template <int N, bool kLast>
constexpr int kTileSums = kThreads * (kLast ? N : 1);

// What a block has of each in shared memory: such sums, rows of the tile's channels, and images.
struct TileNeeds {
  int sums;
  int rows;
  int images;

  template <int N, bool kLast>
  size_t bytes(int64_t run, int64_t vectors) const {
    return sizeof(float) * (sums * kTileSums<N, kLast> + rows * run) + images * 16 * vectors;
  }
};

constexpr TileNeeds kTileForward{2, kTileRows, 1};

// The tile and its bytes, if whole groups fit. The batch has no say, so that a sample's result does not depend on it.
template <typename T, int N, bool kLast>
std::optional<std::pair<Tile, size_t>> make_tile(
    const TileNeeds& needs, int64_t batch, int64_t channels, int64_t pixels, int64_t groups) {
  if (channels * pixels == 0) {
    return std::nullopt;
  }
  const int64_t width = channels / groups;
  Plan plan{batch, channels, pixels, pixels, 1, 0, 1};
  int64_t run;
  size_t bytes;
  if constexpr (kLast) {
    constexpr int64_t kBytes = sizeof(T);
    const auto needed = [&](int64_t size) { return needs.bytes<N, kLast>(size, size / N * pixels); };
    const int64_t step = std::lcm<int64_t>(width, N);
    run = step;
    // No narrower than kTileWide, nor than gives each thread a vector.
    while (run < channels && (run * kBytes < kTileWide || run / N * pixels < kThreads) &&
           needed(run + step) <= kTileShared) {
      run += step;
    }
    bytes = needed(run);
    if (run / N > kThreads || (run < channels && run * kBytes < kTileNarrow)) {
      return std::nullopt;
    }
    plan.columns = static_cast<int>(run / N);
    plan.blocks = (channels + run - 1) / run;
  } else {
    const int64_t vectors = width * pixels / N;
    while (plan.columns < kThreads && 2 * plan.columns <= vectors) {
      plan.columns *= 2;
    }
    const int64_t rows = kThreads / plan.columns;
    run = rows * width;
    bytes = needs.bytes<N, kLast>(run, (vectors + plan.columns - 1) / plan.columns * kThreads);
    plan.channels = groups;
    plan.pixels = plan.chunk = width * pixels;
    plan.blocks = (groups + rows - 1) / rows;
  }
  if (bytes > kTileShared) {
    return std::nullopt;
  }
  const Tile tile{
      plan, channels, groups, static_cast<int>(width), static_cast<int>(pixels), static_cast<int>(run)};
  return std::pair{tile, bytes};
}

// In every lane alike: at each step both of a pair add the same two numbers.
__device__ float sum_of_warp(float sum) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kWholeWarp, sum, distance);
  }
  return sum;
}

// What a warp's lanes find in `sums` of group `group` of the tile. In channels_last the sums are [rows of threads,
// channels of the tile], otherwise [groups of the tile, threads to a group].
template <bool kLast>
__device__ float sum_of_group(const float* sums, const Tile& tile, int group) {
  const int across = kLast ? tile.width : tile.plan.columns;
  const int down = kLast ? kThreads / tile.plan.columns : 1;
  const int lane = threadIdx.x % kWarp;
  int row = lane / across;
  int column = lane % across;
  float sum = 0.0f;
#pragma unroll 4
  while (row < down) {
    sum += sums[row * tile.run + group * across + column];
    row += kWarp / across;
    column += kWarp % across;
    if (column >= across) {
      column -= across;
      ++row;
    }
  }
  return sum_of_warp(sum);
}

// The mean from a sum, then corrected by the sum of what differs from it; the variance from the squares of the same
// differences: the corrected two-pass algorithm of Chan, Golub and LeVeque, "Algorithms for computing the sample
// variance", 1983.
template <typename T, int N, bool kLast>
__global__ void CTM_FAST_STREAMING tile_kernel(
    const T* __restrict__ x, const T* __restrict__ residual, Modulation modulation, float* __restrict__ mean,
    float* __restrict__ rstd, T* __restrict__ out, float eps, bool silu, float out_scale, Tile tile) {
  const Share<N, kLast> share(tile.plan);
  constexpr int M = share.kChannels;
  using Numbers = Vector<float, M>;
  constexpr int kPairs = kInFlight / 2;  // each of two loads
  const int columns = tile.plan.columns;
  const int run = tile.run;
  const int owners = kThreads / columns * columns;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int groups = tile.count();
  const int64_t first = share.image * tile.channels + tile.first();  // channel, of all the samples'
  const int64_t start = share.image * tile.plan.size() + share.first;
  const float pixels = static_cast<float>(tile.pixels);
  const float size = pixels * static_cast<float>(tile.width);

  float* sums = shared_memory<float>();
  float* more_sums = sums + kTileSums<N, kLast>;
  float* rows = more_sums + kTileSums<N, kLast>;
  T* own = reinterpret_cast<T*>(rows + kTileRows * run) + threadIdx.x * N;
  // Where a row has the numbers of the thread's vector k.
  const auto place = [&](int k) {
    return kLast ? static_cast<int>(threadIdx.x) % columns * N
                 : share.row * tile.width + (share.lane + k * columns) / (tile.pixels / N);
  };

  Numbers total{};
  for (int k = 0; k < share.count; k += kInFlight) {
    Vector<T, N> loaded[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (k + u < share.count) {
        loaded[u] = Vector<T, N>::load(x + start + (k + u) * share.step);
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (k + u < share.count) {
        loaded[u].keep(own + (k + u) * owners * N);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          total.values[i % M] += static_cast<float>(loaded[u].values[i]);
        }
      }
    }
  }
  total.keep(sums + threadIdx.x * M);
  __syncthreads();

#pragma unroll 1
  for (int group = warp; group < groups; group += kWarps) {
    float moved = 0.0f;
#pragma unroll 1
    for (int channel = group * tile.width + lane; channel < (group + 1) * tile.width; channel += kWarp) {
      moved += modulation.moved(first + channel);
    }
    const float rough = (sum_of_group<kLast>(sums, tile, group) + pixels * sum_of_warp(moved)) / size;
#pragma unroll 1
    for (int channel = group * tile.width + lane; channel < (group + 1) * tile.width; channel += kWarp) {
      rows[kTileCentre * run + channel] = rough - modulation.moved(first + channel);
    }
    if (lane == 0) {
      rows[kTileMean * run + group] = rough;
    }
  }
  __syncthreads();

  total = {};
  Numbers squares{};
  if (share.count > 0) {
    Numbers centre = Numbers::load(rows + kTileCentre * run + place(0));
#pragma unroll kInFlight
    for (int k = 0; k < share.count; ++k) {
      const auto kept = Vector<T, N>::load(own + k * owners * N);
      if constexpr (!kLast) {
        centre = Numbers::load(rows + kTileCentre * run + place(k));
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float apart = static_cast<float>(kept.values[i]) - centre.values[i % M];
        total.values[i % M] += apart;
        squares.values[i % M] += apart * apart;
      }
    }
  }
  total.keep(sums + threadIdx.x * M);
  squares.keep(more_sums + threadIdx.x * M);
  __syncthreads();

#pragma unroll 1
  for (int group = warp; group < groups; group += kWarps) {
    const float missed = sum_of_group<kLast>(sums, tile, group) / size;
    const float variance = sum_of_group<kLast>(more_sums, tile, group) / size - missed * missed;
    const float group_mean = rows[kTileMean * run + group] + missed;
    const float group_rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);  // not fmaxf: NaN is NaN
#pragma unroll 1
    for (int channel = group * tile.width + lane; channel < (group + 1) * tile.width; channel += kWarp) {
      const Affine affine =
          modulation.affine(group_mean, group_rstd, tile.first() + channel, first + channel);
      rows[kTileCentre * run + channel] = affine.centre;
      rows[kTileGain * run + channel] = affine.gain;
      rows[kTileOffset * run + channel] = affine.offset;
    }
    if (lane == 0) {
      const int64_t at = share.image * tile.groups + tile.first() / tile.width + group;
      mean[at] = group_mean;
      rstd[at] = group_rstd;
    }
  }
  __syncthreads();

  if (share.count == 0) {
    return;
  }
  Numbers centre = Numbers::load(rows + kTileCentre * run + place(0));
  Numbers gain = Numbers::load(rows + kTileGain * run + place(0));
  Numbers offset = Numbers::load(rows + kTileOffset * run + place(0));
  for (int k = 0; k < share.count; k += kPairs) {
    Vector<T, N> added[kPairs];
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count && residual != nullptr) {
        added[u] = Vector<T, N>::load(residual + start + (k + u) * share.step);
      }
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count) {
        const auto kept = Vector<T, N>::load(own + (k + u) * owners * N);
        if constexpr (!kLast) {
          centre = Numbers::load(rows + kTileCentre * run + place(k + u));
          gain = Numbers::load(rows + kTileGain * run + place(k + u));
          offset = Numbers::load(rows + kTileOffset * run + place(k + u));
        }
        Vector<T, N> result;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float y = (static_cast<float>(kept.values[i]) - centre.values[i % M]) * gain.values[i % M] +
              offset.values[i % M];
          y = silu ? y * sigmoid(y) : y;
          y = residual != nullptr ? y + static_cast<float>(added[u].values[i]) : y;
          result.values[i] = static_cast<T>(y * out_scale);
        }
        result.store(out + start + (k + u) * share.step);
      }
    }
  }
}

}  // namespace
}  // namespace ctm_fast::cuda
