// group_norm_silu by parts of an image, whatever its size, and its gradient.
//
// Forward, three launches: mean and M2 of each channel in each chunk of pixels; their merging into the statistics of
// groups and three numbers for each channel of each sample; y from x and those, x read again, from L2 where it fits.
// Backward, four: those three numbers; sums over the pixels of each chunk; their merging; dx.
// A channel's numbers are merged into its group afterwards, so that a thread handles whole 16-byte vectors of channels
// whatever the groups' width is.
#pragma once

#include "group_norm_affine.cuh"

namespace ctm_fast::cuda {
namespace {

// [rows, batch, channels] float32, what the small kernels tell the large ones of each channel of each sample.
enum Row { kCentre, kGain, kOffset, kForwardRows, kLessMean = kForwardRows, kLessSlope, kBackwardRows };

__device__ void write(float* rows, int64_t plane, int64_t at, const Affine& affine) {
  rows[kCentre * plane + at] = affine.centre;
  rows[kGain * plane + at] = affine.gain;
  rows[kOffset * plane + at] = affine.offset;
}

// partial [batch, chunks, channels, 2]: mean and M2 of each channel of a chunk, before x_shift.
template <typename T, int N, bool kLast>
__global__ void CTM_FAST_STREAMING moments_kernel(const T* __restrict__ x, float* __restrict__ partial, Plan plan) {
  const Share<N, kLast> share(plan);
  constexpr int M = share.kChannels;
  constexpr int kTaken = M > 4 ? kInFlight / 2 : kInFlight;  // at once: eight channels' numbers take 24 registers
  const T* at = x + share.image * plan.size() + share.first;
  float values[3][M] = {};  // count, mean, squares
  float before = 0.0f;      // of every channel: the count so far
  for (int k = 0; k < share.count; k += kTaken) {
    Vector<T, N> loaded[kTaken];
    const int taken = share.count - k < kTaken ? share.count - k : kTaken;
#pragma unroll
    for (int u = 0; u < kTaken; ++u) {
      if (u < taken) {
        loaded[u] = Vector<T, N>::load(at + (k + u) * share.step);
      }
    }
    const float count = static_cast<float>(taken * (N / M));
    const float part = 1.0f / count;
    const float weight = count / (before + count);
#pragma unroll
    for (int channel = 0; channel < M; ++channel) {
      float sum = 0.0f;
#pragma unroll
      for (int u = 0; u < kTaken; ++u) {
#pragma unroll
        for (int i = channel; i < N; i += M) {
          sum += u < taken ? static_cast<float>(loaded[u].values[i]) : 0.0f;
        }
      }
      float squares = 0.0f;
#pragma unroll
      for (int u = 0; u < kTaken; ++u) {
#pragma unroll
        for (int i = channel; i < N; i += M) {
          const float apart = static_cast<float>(loaded[u].values[i]) - sum * part;
          squares += u < taken ? apart * apart : 0.0f;
        }
      }
      const float delta = sum * part - values[1][channel];  // merge(), whose weights the channels share
      values[1][channel] += delta * weight;
      values[2][channel] += squares + delta * delta * before * weight;
    }
    before += count;
  }
#pragma unroll
  for (int channel = 0; channel < M; ++channel) {
    values[0][channel] = before;
  }
  reduce(share, plan.columns, values, [](float(&a)[3], const float(&b)[3]) {
    const Moments both = merge({a[0], a[1], a[2]}, {b[0], b[1], b[2]});
    a[0] = both.count;
    a[1] = both.mean;
    a[2] = both.squares;
  });
  if (share.stores()) {
    Vector<float, 2 * M> pairs;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      pairs.values[2 * i] = values[1][i];
      pairs.values[2 * i + 1] = values[2][i];
    }
    pairs.store(partial + 2 * ((share.image * plan.chunks + share.chunk) * plan.channels + share.channel));
  }
}

// A warp for each group of each sample: its mean and rstd, and the affine map of each of its channels.
__global__ void __launch_bounds__(kThreads) merge_kernel(
    const float* __restrict__ partial, Modulation modulation, float* __restrict__ mean, float* __restrict__ rstd,
    float* __restrict__ rows, float eps, int64_t groups, Plan plan) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // of all the samples'
  const int lane = threadIdx.x % kWarp;
  if (group >= plan.batch * groups) {
    return;
  }
  const int64_t image = group / groups;
  const int64_t width = plan.channels / groups;
  const int64_t first = group % groups * width;
  Moments moments{0.0f, 0.0f, 0.0f};
  for (int64_t item = lane; item < width * plan.chunks; item += kWarp) {
    const int64_t channel = first + item % width;
    const int64_t chunk = item / width;
    const int64_t left = plan.pixels - chunk * plan.chunk;
    const auto one = Vector<float, 2>::load(partial + 2 * ((image * plan.chunks + chunk) * plan.channels + channel));
    const float count = static_cast<float>(left < plan.chunk ? left : plan.chunk);
    moments = merge(moments, {count, one.values[0] + modulation.moved(image * plan.channels + channel), one.values[1]});
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float count = __shfl_xor_sync(kWholeWarp, moments.count, distance);
    const float other_mean = __shfl_xor_sync(kWholeWarp, moments.mean, distance);
    moments = merge(moments, {count, other_mean, __shfl_xor_sync(kWholeWarp, moments.squares, distance)});
  }
  // Every lane has the sum, each in an order of its own: that of lane 0 counts.
  const float group_mean = __shfl_sync(kWholeWarp, moments.mean, 0);
  const float squares = __shfl_sync(kWholeWarp, moments.squares, 0);
  const float variance = moments.count > 0 ? squares / moments.count : 0.0f;
  const float group_rstd = 1.0f / sqrtf(variance + eps);
  if (lane == 0) {
    mean[group] = group_mean;
    rstd[group] = group_rstd;
  }
  for (int64_t channel = first + lane; channel < first + width; channel += kWarp) {
    const int64_t at = image * plan.channels + channel;
    write(rows, plan.batch * plan.channels, at, modulation.affine(group_mean, group_rstd, channel, at));
  }
}

template <typename T, int N, bool kLast>
__global__ void CTM_FAST_STREAMING forward_kernel(
    const T* __restrict__ x, const T* __restrict__ residual, const float* __restrict__ rows, T* __restrict__ out,
    bool silu, float out_scale, Plan plan) {
  const Share<N, kLast> share(plan);
  constexpr int M = share.kChannels;
  if (share.count == 0) {
    return;
  }
  using Numbers = Vector<float, M>;
  const int64_t plane = plan.batch * plan.channels;
  const float* numbers = rows + share.image * plan.channels + share.channel;
  const Numbers centre = Numbers::load(numbers + kCentre * plane);
  const Numbers gain = Numbers::load(numbers + kGain * plane);
  const Numbers offset = Numbers::load(numbers + kOffset * plane);
  const int64_t start = share.image * plan.size() + share.first;
  constexpr int kPairs = kInFlight / 2;  // each of a load of x and one of the residual
  for (int k = 0; k < share.count; k += kPairs) {
    Vector<T, N> loaded[kPairs];
    Vector<T, N> added[kPairs];
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count) {
        loaded[u] = Vector<T, N>::load(x + start + (k + u) * share.step);
        if (residual != nullptr) {
          added[u] = Vector<T, N>::load(residual + start + (k + u) * share.step);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kPairs; ++u) {
      if (k + u < share.count) {
        Vector<T, N> result;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float y = (static_cast<float>(loaded[u].values[i]) - centre.values[i % M]) * gain.values[i % M] +
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

// The affine map of each channel of each sample, from the statistics that the forward pass kept.
__global__ void __launch_bounds__(kThreads) affine_kernel(
    const float* __restrict__ mean, const float* __restrict__ rstd, Modulation modulation, float* __restrict__ rows,
    int64_t groups, Plan plan) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= plan.batch * plan.channels) {
    return;
  }
  const int64_t channel = at % plan.channels;
  const int64_t group = at / plan.channels * groups + channel / (plan.channels / groups);
  write(rows, plan.batch * plan.channels, at, modulation.affine(mean[group], rstd[group], channel, at));
}

// partial [3, batch, chunks, channels]: sums over the pixels of a chunk of g, g (x - centre) and x - centre.
template <typename T, int N, bool kLast>
__global__ void CTM_FAST_SUMMING sums_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ rows, float* __restrict__ partial,
    bool silu, float out_scale, Plan plan) {
  const Share<N, kLast> share(plan);
  constexpr int M = share.kChannels;
  float values[3][M] = {};
  if (share.count > 0) {
    using Numbers = Vector<float, M>;
    const int64_t plane = plan.batch * plan.channels;
    const float* numbers = rows + share.image * plan.channels + share.channel;
    const Numbers centre = Numbers::load(numbers + kCentre * plane);
    const Numbers gain = Numbers::load(numbers + kGain * plane);
    const Numbers offset = Numbers::load(numbers + kOffset * plane);
    const int64_t start = share.image * plan.size() + share.first;
    constexpr int kPairs = kInFlight / 2;  // each of two loads
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
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float apart = static_cast<float>(x_loaded[u].values[i]) - centre.values[i % M];
            const float g = before_silu(
                static_cast<float>(grad_loaded[u].values[i]), apart, gain.values[i % M], offset.values[i % M], silu,
                out_scale);
            values[0][i % M] += g;
            values[1][i % M] += g * apart;
            values[2][i % M] += apart;
          }
        }
      }
    }
  }
  reduce(share, plan.columns, values, [](float(&a)[3], const float(&b)[3]) {
    a[0] += b[0];
    a[1] += b[1];
    a[2] += b[2];
  });
  if (share.stores()) {
    const int64_t plane = plan.batch * plan.chunks * plan.channels;
    float* out = partial + (share.image * plan.chunks + share.chunk) * plan.channels + share.channel;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      Vector<float, M> sums;
#pragma unroll
      for (int i = 0; i < M; ++i) {
        sums.values[i] = values[q][i];
      }
      sums.store(out + q * plane);
    }
  }
}

// A warp for each group of each sample: sums [3, batch, channels] of g, g n and n, and what dx takes from its group.
__global__ void __launch_bounds__(kThreads) merge_sums_kernel(
    const float* __restrict__ partial, const float* __restrict__ rstd, Modulation modulation, float* __restrict__ sums,
    float* __restrict__ rows, int64_t groups, Plan plan) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // of all the samples'
  const int lane = threadIdx.x % kWarp;
  if (group >= plan.batch * groups) {
    return;
  }
  const int64_t image = group / groups;
  const int64_t width = plan.channels / groups;
  const int64_t first = group % groups * width;
  const int64_t plane = plan.batch * plan.channels;
  const float r = rstd[group];
  float of_gradient = 0.0f;
  float of_product = 0.0f;
  for (int64_t channel = first + lane; channel < first + width; channel += kWarp) {
    float found[3] = {};
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t at = (image * plan.chunks + chunk) * plan.channels + channel;
#pragma unroll
      for (int q = 0; q < 3; ++q) {
        found[q] += partial[q * plane * plan.chunks + at];
      }
    }
    const int64_t at = image * plan.channels + channel;
    found[1] *= r;
    found[2] *= r;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      sums[q * plane + at] = found[q];
    }
    const float gain = modulation.weight[channel] * modulation.factor(at);
    of_gradient += gain * found[0];
    of_product += gain * found[1];
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    of_gradient += __shfl_xor_sync(kWholeWarp, of_gradient, distance);
    of_product += __shfl_xor_sync(kWholeWarp, of_product, distance);
  }
  const float size = static_cast<float>(width * plan.pixels);
  for (int64_t channel = first + lane; channel < first + width; channel += kWarp) {
    rows[kLessMean * plane + image * plan.channels + channel] = r * (of_gradient / size);
    rows[kLessSlope * plane + image * plan.channels + channel] = r * r * (of_product / size);
  }
}

// dx = rstd (g weight (1 + scale) - mean(...) - n mean(... n)) = g gain - less_mean - (x - centre) less_slope
template <typename T, int N, bool kLast>
__global__ void CTM_FAST_STREAMING backward_kernel(
    const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ rows, T* __restrict__ dx, bool silu,
    float out_scale, Plan plan) {
  const Share<N, kLast> share(plan);
  constexpr int M = share.kChannels;
  if (share.count == 0) {
    return;
  }
  using Numbers = Vector<float, M>;
  const int64_t plane = plan.batch * plan.channels;
  const float* numbers = rows + share.image * plan.channels + share.channel;
  const Numbers centre = Numbers::load(numbers + kCentre * plane);
  const Numbers gain = Numbers::load(numbers + kGain * plane);
  const Numbers offset = Numbers::load(numbers + kOffset * plane);
  const Numbers less_mean = Numbers::load(numbers + kLessMean * plane);
  const Numbers less_slope = Numbers::load(numbers + kLessSlope * plane);
  const int64_t start = share.image * plan.size() + share.first;
  for (int k = 0; k < share.count; ++k) {
    const auto x_loaded = Vector<T, N>::load(x + start + k * share.step);
    const auto grad_loaded = Vector<T, N>::load(grad + start + k * share.step);
    Vector<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float apart = static_cast<float>(x_loaded.values[i]) - centre.values[i % M];
      const float g = before_silu(
          static_cast<float>(grad_loaded.values[i]), apart, gain.values[i % M], offset.values[i % M], silu, out_scale);
      result.values[i] =
          static_cast<T>(g * gain.values[i % M] - less_mean.values[i % M] - apart * less_slope.values[i % M]);
    }
    result.store(dx + start + k * share.step);
  }
}

}  // namespace
}  // namespace ctm_fast::cuda
