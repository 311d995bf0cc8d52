// Group normalisation, modulation, SiLU and residual in CUDA, and their gradient.
//
// Forward, three launches: mean and M2 of each channel in each chunk of pixels; their merging into the statistics of
// groups and three numbers for each channel of each sample; y from x and those, x read again, from L2 where it fits.
// Backward, four: those three numbers; sums over the pixels of each chunk; their merging; dx.
// A channel's numbers are merged into its group afterwards, so that a thread handles whole 16-byte vectors of channels
// whatever the groups' width is. No atomics: a result is the same every time, and in every batch.
#include "../common/group_norm_silu.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "group_norm.cuh"

namespace ctm_fast::cuda {
namespace {

// Three blocks of 256 threads on a multiprocessor, 80 registers for a thread: 24 of its 64 (sm_80, sm_90) warps, each
// with kInFlight loads of 16 bytes a lane under way, are more than its share of the bandwidth times the latency.
#define CTM_FAST_STREAMING __launch_bounds__(kThreads, 3)

// Two, 128 registers: 48 of them hold what eight channels add up and are made of.
#define CTM_FAST_SUMMING __launch_bounds__(kThreads, 2)

constexpr int kWarps = kThreads / kWarp;

// [rows, batch, channels] float32, what the small kernels tell the large ones of each channel of each sample.
enum Row { kCentre, kGain, kOffset, kForwardRows, kLessMean = kForwardRows, kLessSlope, kBackwardRows };

// z = (x - centre) gain + offset
struct Affine {
  float centre;
  float gain;
  float offset;
};

struct Modulation {
  const float* weight;
  const float* bias;
  const float* x_shift;
  const float* scale;
  const float* shift;

  // Of channel `channel`, number `at` of all the samples' channels.
  __device__ float factor(int64_t at) const { return scale == nullptr ? 1.0f : 1.0f + scale[at]; }
  __device__ float moved(int64_t at) const { return x_shift == nullptr ? 0.0f : x_shift[at]; }

  __device__ Affine affine(float mean, float rstd, int64_t channel, int64_t at) const {
    return {
        mean - moved(at), rstd * weight[channel] * factor(at),
        bias[channel] * factor(at) + (shift == nullptr ? 0.0f : shift[at])};
  }
};

__device__ void write(float* rows, int64_t plane, int64_t at, const Affine& affine) {
  rows[kCentre * plane + at] = affine.centre;
  rows[kGain * plane + at] = affine.gain;
  rows[kOffset * plane + at] = affine.offset;
}

// Not IEEE's division and expf, which take as many cycles as a memory-bound kernel has: two ulp more.
__device__ float sigmoid(float z) {
  return __fdividef(1.0f, 1.0f + __expf(-z));
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

// The gradient before SiLU, from that of y; apart = x - centre.
__device__ float before_silu(float grad, float apart, float gain, float offset, bool silu, float out_scale) {
  const float g = grad * out_scale;
  if (!silu) {
    return g;
  }
  const float z = apart * gain + offset;
  const float s = sigmoid(z);
  return g * s * (1.0f + z * (1.0f - s));
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

const float* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

dim3 blocks_for(int64_t items, int64_t per_block) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block));
}

// Calls f(T{}, n, last): the type of the images, vectors or single elements (std::integral_constant<int, N>), and whether
// they are channels_last (std::bool_constant). What a thread loads together belongs to one pixel or to one channel.
template <typename F, typename... Pointers>
void dispatch_images(const char* op, const Tensor& x, F&& f, const Pointers*... arrays) {
  const bool last = !x.is_contiguous();
  dispatch_floats(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int N = kVector<T>;
    using Vectors = std::integral_constant<int, N>;
    using Elements = std::integral_constant<int, 1>;
    const bool vectors = vectorises<N>(last ? x.size(1) : x.size(2) * x.size(3), arrays...);
    if (last) {
      vectors ? f(type, Vectors{}, std::true_type{}) : f(type, Elements{}, std::true_type{});
    } else {
      vectors ? f(type, Vectors{}, std::false_type{}) : f(type, Elements{}, std::false_type{});
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
    const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    bool silu, const std::optional<Tensor>& residual, double out_scale) {
  constexpr const char* op = "group_norm_silu";
  check_group_norm_silu(op, x, weight, bias, groups, x_shift, scale, shift, residual);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(1);
  const int64_t pixels = x.size(2) * x.size(3);
  Tensor out = empty_like(x, x.scalar_type());
  Tensor mean = empty_floats(x, {batch, groups});
  Tensor rstd = empty_floats(x, {batch, groups});
  if (batch == 0) {
    return {out, mean, rstd};
  }
  Tensor rows = empty_floats(x, {kForwardRows, batch, channels});
  const Modulation modulation{
      weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), data(x_shift), data(scale), data(shift)};
  dispatch_images(
      op, x,
      [&](auto type, auto n, auto last) {
        using T = decltype(type);
        constexpr int N = n;
        constexpr bool kLast = last;
        const Plan plan = make_plan<N>(batch, channels, pixels, kLast);
        Tensor partial = empty_floats(x, {batch, plan.chunks, channels, 2});
        float* partial_data = partial.mutable_data_ptr<float>();
        const T* x_data = x.const_data_ptr<T>();
        const T* residual_data = residual ? residual->const_data_ptr<T>() : nullptr;
        float* rows_data = rows.mutable_data_ptr<float>();
        const dim3 grid = blocks_for(batch * plan.blocks, 1);
        if (plan.blocks > 0) {
          launch(
              moments_kernel<T, N, kLast>, grid, kThreads, kReduceBytes<N, kLast, 3>, x, x_data, partial_data, plan);
        }
        launch(
            merge_kernel, blocks_for(batch * groups, kWarps), kThreads, 0, x, partial_data, modulation,
            mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), rows_data, static_cast<float>(eps), groups,
            plan);
        if (plan.blocks > 0) {
          launch(
              forward_kernel<T, N, kLast>, grid, kThreads, 0, x, x_data, residual_data, rows_data,
              out.mutable_data_ptr<T>(), silu, static_cast<float>(out_scale), plan);
        }
      },
      static_cast<const char*>(x.const_data_ptr()), static_cast<const char*>(out.const_data_ptr()),
      residual ? static_cast<const char*>(residual->const_data_ptr()) : nullptr);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, int64_t groups, const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, bool silu, double out_scale, bool need_x) {
  constexpr const char* op = "group_norm_silu_backward";
  check_group_norm_silu_backward(op, grad, x, mean, rstd, weight, bias, groups, x_shift, scale, shift);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t batch = x.size(0);
  const int64_t channels = x.size(1);
  const int64_t pixels = x.size(2) * x.size(3);
  Tensor dx = need_x ? empty_like(x, x.scalar_type()) : empty(x, x.scalar_type());
  Tensor sums = empty_floats(x, {3, batch, channels});
  if (batch * channels == 0) {
    return {dx, sums};
  }
  Tensor rows = empty_floats(x, {kBackwardRows, batch, channels});
  const Modulation modulation{
      weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), data(x_shift), data(scale), data(shift)};
  dispatch_images(
      op, x,
      [&](auto type, auto n, auto last) {
        using T = decltype(type);
        constexpr int N = n;
        constexpr bool kLast = last;
        const Plan plan = make_plan<N>(batch, channels, pixels, kLast);
        Tensor partial = empty_floats(x, {3, batch, plan.chunks, channels});
        const T* grad_data = grad.const_data_ptr<T>();
        const T* x_data = x.const_data_ptr<T>();
        const float* rstd_data = rstd.const_data_ptr<float>();
        float* rows_data = rows.mutable_data_ptr<float>();
        float* partial_data = partial.mutable_data_ptr<float>();
        const dim3 grid = blocks_for(batch * plan.blocks, 1);
        if (plan.blocks > 0) {
          launch(
              affine_kernel, blocks_for(batch * channels, kThreads), kThreads, 0, x, mean.const_data_ptr<float>(),
              rstd_data, modulation, rows_data, groups, plan);
          launch(
              sums_kernel<T, N, kLast>, grid, kThreads, kReduceBytes<N, kLast, 3>, x, grad_data, x_data, rows_data,
              partial_data, silu, static_cast<float>(out_scale), plan);
        }
        launch(
            merge_sums_kernel, blocks_for(batch * groups, kWarps), kThreads, 0, x, partial_data, rstd_data, modulation,
            sums.mutable_data_ptr<float>(), rows_data, groups, plan);
        if (plan.blocks > 0 && need_x) {
          launch(
              backward_kernel<T, N, kLast>, grid, kThreads, 0, x, grad_data, x_data, rows_data,
              dx.mutable_data_ptr<T>(), silu, static_cast<float>(out_scale), plan);
        }
      },
      static_cast<const char*>(grad.const_data_ptr()), static_cast<const char*>(x.const_data_ptr()),
      static_cast<const char*>(dx.const_data_ptr()));
  return {dx, sums};
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace
}  // namespace ctm_fast::cuda
