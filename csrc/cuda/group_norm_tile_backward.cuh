// The gradient of group_norm_silu in channels_last in one launch: a block reads x and the gradient once, as
// group_norm_tile.cuh reads x.
#pragma once

#include "group_norm_tile.cuh"

namespace ctm_fast::cuda {
namespace {

// After the affine map: rstd; what dx takes from its group, before which there are the sums of g and g (x - centre).
enum TileBackwardRow { kTileRstd = kTileOffset + 1, kTileLessMean, kTileLessSlope, kTileBackwardRows };

constexpr TileNeeds kTileBackward{1, kTileBackwardRows, 2};

// sums [3, batch, channels] of g, g n and n; dx, if it is wanted, as backward_kernel has it.
template <typename T, int N>
__global__ void CTM_FAST_SUMMING tile_backward_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ mean,
    const float* __restrict__ rstd, Modulation modulation, float* __restrict__ sums, T* __restrict__ dx, bool silu,
    float out_scale, Tile tile) {
  const Share<N, true> share(tile.plan);
  using Numbers = Vector<float, N>;
  constexpr int kPairs = kInFlight / 2;  // each of two loads
  const int columns = tile.plan.columns;
  const int run = tile.run;
  const int owners = kThreads / columns * columns;
  const int lane = threadIdx.x % kWarp;
  const int groups = tile.count();
  const int64_t first = share.image * tile.channels + tile.first();  // channel, of all the samples'
  const int64_t first_group = share.image * tile.groups + tile.first() / tile.width;
  const int64_t start = share.image * tile.plan.size() + share.first;

  float* rows = shared_memory<float>() + kTileSums<N, true>;
  float* place = rows + threadIdx.x % columns * N;  // of the numbers of the thread's channels, in a row
  T* own_x = reinterpret_cast<T*>(rows + kTileBackwardRows * run) + threadIdx.x * N;
  T* own_grad = own_x + columns * tile.pixels * N;

#pragma unroll 1
  for (int channel = threadIdx.x; channel < groups * tile.width; channel += kThreads) {
    const int64_t group = first_group + channel / tile.width;
    const Affine affine = modulation.affine(mean[group], rstd[group], tile.first() + channel, first + channel);
    rows[kTileCentre * run + channel] = affine.centre;
    rows[kTileGain * run + channel] = affine.gain;
    rows[kTileOffset * run + channel] = affine.offset;
    rows[kTileRstd * run + channel] = rstd[group];
  }
  __syncthreads();

  const Numbers centre = Numbers::load(place + kTileCentre * run);
  const Numbers gain = Numbers::load(place + kTileGain * run);
  const Numbers offset = Numbers::load(place + kTileOffset * run);
  float values[3][1][N] = {};
  for (int k = 0; k < share.count; k += kPairs) {
    Vector<T, N> x_loaded[kPairs];
    Vector<T, N> grad_loaded[kPairs];
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count) {
        x_loaded[u] = Vector<T, N>::load(x + start + (k + u) * share.step);
        grad_loaded[u] = Vector<T, N>::load(grad + start + (k + u) * share.step);
      }
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count) {
        x_loaded[u].keep(own_x + (k + u) * owners * N);
        grad_loaded[u].keep(own_grad + (k + u) * owners * N);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float apart = static_cast<float>(x_loaded[u].values[i]) - centre.values[i];
          const float g = before_silu(
              static_cast<float>(grad_loaded[u].values[i]), apart, gain.values[i], offset.values[i], silu, out_scale);
          values[0][0][i] += g;
          values[1][0][i] += g * apart;
          values[2][0][i] += apart;
        }
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    __syncthreads();  // one after the other in the same memory, a third of what all would take
    reduce(share, columns, values[q], [](float(&a)[1], const float(&b)[1]) { a[0] += b[0]; });
  }
  if (share.stores()) {
    const Numbers r = Numbers::load(place + kTileRstd * run);
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      Numbers found;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        found.values[i] = values[q][0][i];
      }
      if (q < 2) {
        found.keep(place + (kTileLessMean + q) * run);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        found.values[i] *= q == 0 ? 1.0f : r.values[i];
      }
      found.store(sums + q * tile.plan.batch * tile.channels + share.image * tile.channels + share.channel);
    }
  }
  if (dx == nullptr) {
    return;
  }
  __syncthreads();

  const float size = static_cast<float>(tile.width) * static_cast<float>(tile.pixels);
#pragma unroll 1
  for (int group = threadIdx.x / kWarp; group < groups; group += kWarps) {
    float of_gradient = 0.0f;
    float of_product = 0.0f;
    const int end = (group + 1) * tile.width;
#pragma unroll 1
    for (int channel = group * tile.width + lane; channel < end; channel += kWarp) {
      of_gradient += rows[kTileGain * run + channel] * rows[kTileLessMean * run + channel];
      of_product += rows[kTileGain * run + channel] * rows[kTileLessSlope * run + channel];
    }
    of_gradient = sum_of_warp(of_gradient) / size;
    of_product = sum_of_warp(of_product) / size;
#pragma unroll 1
    for (int channel = group * tile.width + lane; channel < end; channel += kWarp) {
      const float r = rows[kTileRstd * run + channel];
      rows[kTileLessMean * run + channel] = of_gradient;
      rows[kTileLessSlope * run + channel] = r * r * of_product;
    }
  }
  __syncthreads();

  const Numbers less_mean = Numbers::load(place + kTileLessMean * run);
  const Numbers less_slope = Numbers::load(place + kTileLessSlope * run);
  for (int k = 0; k < share.count; ++k) {
    const auto x_kept = Vector<T, N>::load(own_x + k * owners * N);
    const auto grad_kept = Vector<T, N>::load(own_grad + k * owners * N);
    Vector<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float apart = static_cast<float>(x_kept.values[i]) - centre.values[i];
      const float g = before_silu(
          static_cast<float>(grad_kept.values[i]), apart, gain.values[i], offset.values[i], silu, out_scale);
      result.values[i] = static_cast<T>(g * gain.values[i] - less_mean.values[i] - apart * less_slope.values[i]);
    }
    result.store(dx + start + k * share.step);
  }
}

}  // namespace
}  // namespace ctm_fast::cuda
