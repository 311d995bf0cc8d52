// Group normalisation with shifts, SiLU and residual on the CPU. A thread takes whole groups of an image, few enough that
// the passes after the first find them in the cache; statistics are kept by channel, so neither the blocks nor the
// threads change a bit of the result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/group_norm_silu.h"
#include "../common/silu.h"
#include "../common/tensor.h"
#include "images.h"
#include "moments.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

// Neighbours of a contiguous channel that are summed side by side, as the channels of a channels_last image are.
constexpr int64_t kLanes = 16;
// Bytes of a contiguous image in a block, where its groups allow: half of a small second-level cache.
constexpr int64_t kBlockBytes = 262144;
// Channels of a channels_last image in a block, roughly. Many: memory is read in long runs. Few, but whole cache lines,
// where there are not images enough to keep the threads busy.
constexpr int64_t kManyChannels = 256;
constexpr int64_t kFewChannels = 64;
constexpr int64_t kManyImages = 8;

// Where the pixels of a batch lie, and how its groups are dealt out.
struct Layout {
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  int64_t block_groups;

  Layout(const Tensor& x, int64_t groups)
      : batch(x.size(0)),
        channels(x.size(1)),
        pixels(x.size(2) * x.size(3)),
        groups(groups),
        channels_last(pixels == 1 || !x.is_contiguous()),
        block_groups(groups) {
    const int64_t size = channels / groups;
    if (channels_last) {
      const int64_t blocks = std::max<int64_t>(1, channels / (batch < kManyImages ? kFewChannels : kManyChannels));
      block_groups = (groups + blocks - 1) / blocks;
      while (block_groups < groups && block_groups * size % kLanes != 0) {
        ++block_groups;
      }
    } else {
      const int64_t bytes = std::max<int64_t>(1, pixels * size * static_cast<int64_t>(sizeof(float)));
      block_groups = std::clamp<int64_t>(kBlockBytes / bytes, 1, groups);
    }
  }

  int64_t channel(int64_t group) const { return group * (channels / groups); }

  // Calls f(image, first group, last group) for every block.
  template <typename F>
  void for_each_block(const F& f) const {
    const int64_t blocks = (groups + block_groups - 1) / block_groups;
    const int64_t elements = block_groups * (channels / groups) * pixels;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
    torch::stable::parallel_for(0, batch * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block % blocks * block_groups;
        f(block / blocks, first, std::min(groups, first + block_groups));
      }
    });
  }
};

// The op's vectors, as the kernels read them: [C], and [B, C] or null.
struct Vectors {
  const float *weight, *bias, *x_shift, *scale, *shift;

  Vectors(
      const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& x_shift,
      const std::optional<Tensor>& scale, const std::optional<Tensor>& shift)
      : weight(weight.const_data_ptr<float>()),
        bias(bias.const_data_ptr<float>()),
        x_shift(x_shift ? x_shift->const_data_ptr<float>() : nullptr),
        scale(scale ? scale->const_data_ptr<float>() : nullptr),
        shift(shift ? shift->const_data_ptr<float>() : nullptr) {}
};

// What each channel of a block is normalised with:
//   n = (x - center) rstd + lost,   z = n gain + offset
// center + rounded rest = mean - x_shift: what float32 cannot hold of it, far from zero, is in lost = -rest rstd.
struct Constants {
  std::vector<float> center, rstd, lost, gain, offset;

  explicit Constants(int64_t width) : center(width), rstd(width), lost(width), gain(width), offset(width) {}

  void set(int64_t i, double mean, float reciprocal, const Vectors& vectors, int64_t channel, int64_t sample) {
    const double middle = mean - (vectors.x_shift ? vectors.x_shift[sample] : 0.0f);
    const float factor = vectors.scale ? 1.0f + vectors.scale[sample] : 1.0f;
    center[i] = static_cast<float>(middle);
    rstd[i] = reciprocal;
    lost[i] = static_cast<float>((center[i] - middle) * reciprocal);
    gain[i] = vectors.weight[channel] * factor;
    offset[i] = vectors.bias[channel] * factor + (vectors.shift ? vectors.shift[sample] : 0.0f);
  }
};

// y = (silu(z) + residual) out_scale over rows of `width` numbers. `columns`: each has constants of its own, as in a
// channels_last image; else all have the first.
template <typename T, bool columns, bool silu_behind, bool add>
CTM_FAST_WIDEST void normalise(
    const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ out, const float* __restrict__ center,
    const float* __restrict__ slope, const float* __restrict__ offset, float out_scale, int64_t rows, int64_t width,
    int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * stride;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = columns ? i : 0;
      float y = fmaf(static_cast<float>(x[begin + i]) - center[c], slope[c], offset[c]);
      if constexpr (silu_behind) {
        y = silu(y);
      }
      if constexpr (add) {
        y += static_cast<float>(residual[begin + i]);
      }
      out[begin + i] = static_cast<T>(y * out_scale);
    }
  }
}

// The gradient g before SiLU, and the normalised n.
struct Gradient {
  float g, n;
};

template <bool silu_behind>
inline Gradient gradient(float grad, float x, float center, float rstd, float lost, float gain, float offset) {
  const float n = fmaf(x - center, rstd, lost);
  if constexpr (silu_behind) {
    grad *= silu_derivative(fmaf(n, gain, offset));
  }
  return {grad, n};
}

// Adds g, g n and n to the sums of their column, [3][width]; tile by tile in float32, and these in float64.
template <typename T, bool columns, bool silu_behind>
CTM_FAST_WIDEST void add_sums(
    const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ center,
    const float* __restrict__ rstd, const float* __restrict__ lost, const float* __restrict__ gain,
    const float* __restrict__ offset, float out_scale, int64_t rows, int64_t width, int64_t stride,
    double* __restrict__ sums, int64_t sums_stride) {
  for (int64_t begin = 0; begin < rows; begin += kTileRows) {
    const int64_t end = std::min(rows, begin + kTileRows);
    for (int64_t first = 0; first < width; first += kColumns) {
      const int64_t count = std::min(kColumns, width - first);
      const int64_t constant = columns ? first : 0;
      float sum_g[kColumns] = {}, sum_g_n[kColumns] = {}, sum_n[kColumns] = {};
      for (int64_t row = begin; row < end; ++row) {
        const int64_t origin = row * stride + first;
        prefetch_rows(grad + origin + kTileRows * stride, 1, count, stride);
        prefetch_rows(x + origin + kTileRows * stride, 1, count, stride);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t c = constant + (columns ? i : 0);
          const Gradient found = gradient<silu_behind>(
              static_cast<float>(grad[origin + i]) * out_scale, static_cast<float>(x[origin + i]), center[c], rstd[c],
              lost[c], gain[c], offset[c]);
          sum_g[i] += found.g;
          sum_g_n[i] = fmaf(found.g, found.n, sum_g_n[i]);
          sum_n[i] += found.n;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        sums[first + i] += sum_g[i];
        sums[sums_stride + first + i] += sum_g_n[i];
        sums[2 * sums_stride + first + i] += sum_n[i];
      }
    }
  }
}

// dx = g slope - mean_g - n mean_g_n, the last two already times rstd.
template <typename T, bool columns, bool silu_behind>
CTM_FAST_WIDEST void differentiate(
    const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ dx, const float* __restrict__ center,
    const float* __restrict__ rstd, const float* __restrict__ lost, const float* __restrict__ gain,
    const float* __restrict__ offset, const float* __restrict__ mean_g, const float* __restrict__ mean_g_n,
    float out_scale, int64_t rows, int64_t width, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * stride;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = columns ? i : 0;
      const Gradient found = gradient<silu_behind>(
          static_cast<float>(grad[begin + i]) * out_scale, static_cast<float>(x[begin + i]), center[c], rstd[c],
          lost[c], gain[c], offset[c]);
      dx[begin + i] = static_cast<T>(fmaf(found.g, gain[c] * rstd[c], fmaf(-found.n, mean_g_n[c], -mean_g[c])));
    }
  }
}

// Mean and squared deviations of a channel of a contiguous image.
template <typename T>
void channel_moments(const T* x, int64_t pixels, double& mean, double& square) {
  const int64_t rows = pixels / kLanes;
  const int64_t rest = pixels % kLanes;
  double means[kLanes] = {}, squares[kLanes] = {};
  add_moments(x, rows, kLanes, kLanes, 0, means, squares);
  add_moments(x + rows * kLanes, 1, rest, kLanes, rows, means, squares);
  mean = square = 0.0;
  for (int64_t i = 0; i < kLanes; ++i) {
    mean += means[i] * static_cast<double>(rows + (i < rest));
  }
  mean /= static_cast<double>(pixels);
  for (int64_t i = 0; i < kLanes; ++i) {
    const double delta = means[i] - mean;
    square += squares[i] + delta * delta * static_cast<double>(rows + (i < rest));
  }
}

template <typename T>
void forward_block(
    const T* x, const T* residual, T* out, float* mean_out, float* rstd_out, const Layout& layout,
    const Vectors& vectors, double eps, bool silu_behind, float out_scale, int64_t image, int64_t first_group,
    int64_t last_group) {
  const int64_t channels = layout.channels, pixels = layout.pixels, groups = layout.groups;
  const bool channels_last = layout.channels_last;
  const int64_t size = channels / groups;
  const int64_t first = layout.channel(first_group);
  const int64_t width = layout.channel(last_group) - first;
  const int64_t origin = image * channels * pixels + first * (channels_last ? 1 : pixels);

  std::vector<double> means(width), squares(width);
  if (channels_last) {
    add_moments(x + origin, pixels, width, channels, 0, means.data(), squares.data());
  } else {
    for (int64_t i = 0; i < width; ++i) {
      channel_moments(x + origin + i * pixels, pixels, means[i], squares[i]);
    }
  }
  Constants constants(width);
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = layout.channel(group) - first;
    const float* x_shift = vectors.x_shift ? vectors.x_shift + image * channels + first : nullptr;
    double mean = 0.0, square = 0.0;
    for (int64_t i = begin; i < begin + size; ++i) {
      means[i] += x_shift ? x_shift[i] : 0.0f;
      mean += means[i];
    }
    mean /= static_cast<double>(size);
    for (int64_t i = begin; i < begin + size; ++i) {
      const double delta = means[i] - mean;
      square += squares[i] + delta * delta * static_cast<double>(pixels);
    }
    const float rstd = static_cast<float>(1.0 / std::sqrt(square / static_cast<double>(size * pixels) + eps));
    mean_out[image * groups + group] = static_cast<float>(mean);
    rstd_out[image * groups + group] = rstd;
    for (int64_t i = begin; i < begin + size; ++i) {
      constants.set(i, mean, rstd, vectors, first + i, image * channels + first + i);
    }
  }
  // (x - center) slope + offset, one multiplication less than by n: this pass alone needs no n.
  std::vector<float> slope(width);
  for (int64_t i = 0; i < width; ++i) {
    slope[i] = constants.gain[i] * constants.rstd[i];
    constants.offset[i] += constants.gain[i] * constants.lost[i];
  }
  const auto run = [&](auto columns, auto activate, auto add) {
    const int64_t rows = columns ? pixels : 1;
    for (int64_t i = 0; i < (columns ? 1 : width); ++i) {
      const int64_t at = origin + i * pixels;
      normalise<T, columns, activate, add>(
          x + at, add ? residual + at : nullptr, out + at, constants.center.data() + i, slope.data() + i,
          constants.offset.data() + i, out_scale, rows, columns ? width : pixels, channels);
    }
  };
  const auto with_bool = [](bool value, const auto& f) { value ? f(std::true_type{}) : f(std::false_type{}); };
  with_bool(channels_last, [&](auto columns) {
    with_bool(silu_behind, [&](auto activate) {
      with_bool(residual != nullptr, [&](auto add) { run(columns, activate, add); });
    });
  });
}

template <typename T>
void backward_block(
    const T* grad, const T* x, T* dx, const float* mean, const float* rstd, float* sums_out, const Layout& layout,
    const Vectors& vectors, bool silu_behind, float out_scale, int64_t image, int64_t first_group,
    int64_t last_group) {
  const int64_t channels = layout.channels, pixels = layout.pixels, groups = layout.groups;
  const bool channels_last = layout.channels_last;
  const int64_t size = channels / groups;
  const int64_t first = layout.channel(first_group);
  const int64_t width = layout.channel(last_group) - first;
  const int64_t origin = image * channels * pixels + first * (channels_last ? 1 : pixels);

  Constants constants(width);
  for (int64_t i = 0; i < width; ++i) {
    const int64_t group = image * groups + (first + i) / size;
    constants.set(i, mean[group], rstd[group], vectors, first + i, image * channels + first + i);
  }
  const std::vector<float>&center = constants.center, &reciprocal = constants.rstd, &lost = constants.lost;
  const std::vector<float>&gain = constants.gain, &offset = constants.offset;
  std::vector<double> sums(3 * width);
  const auto sum = [&](auto columns, auto activate) {
    if constexpr (columns) {
      add_sums<T, columns, activate>(
          grad + origin, x + origin, center.data(), reciprocal.data(), lost.data(), gain.data(), offset.data(),
          out_scale, pixels, width, channels, sums.data(), width);
      return;
    }
    const int64_t rows = pixels / kLanes;
    for (int64_t i = 0; i < width; ++i) {
      double lanes[3][kLanes] = {};
      const auto add = [&](int64_t at, int64_t rows, int64_t width) {
        add_sums<T, columns, activate>(
            grad + at, x + at, &center[i], &reciprocal[i], &lost[i], &gain[i], &offset[i], out_scale, rows, width,
            kLanes, lanes[0], kLanes);
      };
      add(origin + i * pixels, rows, kLanes);
      add(origin + i * pixels + rows * kLanes, 1, pixels % kLanes);
      for (int64_t kind = 0; kind < 3; ++kind) {
        for (const double lane : lanes[kind]) {
          sums[kind * width + i] += lane;
        }
      }
    }
  };
  const auto with_bool = [](bool value, const auto& f) { value ? f(std::true_type{}) : f(std::false_type{}); };
  with_bool(channels_last, [&](auto columns) {
    with_bool(silu_behind, [&](auto activate) { sum(columns, activate); });
  });
  for (int64_t kind = 0; kind < 3; ++kind) {
    for (int64_t i = 0; i < width; ++i) {
      sums_out[(kind * layout.batch + image) * channels + first + i] = static_cast<float>(sums[kind * width + i]);
    }
  }
  if (dx == nullptr) {
    return;
  }
  std::vector<float> mean_g(width), mean_g_n(width);
  for (int64_t begin = 0; begin < width; begin += size) {
    double total_g = 0.0, total_g_n = 0.0;
    for (int64_t i = begin; i < begin + size; ++i) {
      total_g += gain[i] * sums[i];
      total_g_n += gain[i] * sums[width + i];
    }
    const double factor = reciprocal[begin] / static_cast<double>(size * pixels);
    std::fill_n(mean_g.begin() + begin, size, static_cast<float>(total_g * factor));
    std::fill_n(mean_g_n.begin() + begin, size, static_cast<float>(total_g_n * factor));
  }
  with_bool(channels_last, [&](auto columns) {
    with_bool(silu_behind, [&](auto activate) {
      const int64_t rows = columns ? pixels : 1;
      for (int64_t i = 0; i < (columns ? 1 : width); ++i) {
        const int64_t at = origin + i * pixels;
        differentiate<T, columns, activate>(
            grad + at, x + at, dx + at, &center[i], &reciprocal[i], &lost[i], &gain[i], &offset[i], &mean_g[i],
            &mean_g_n[i], out_scale, rows, columns ? width : pixels, channels);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
    const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    bool silu, const std::optional<Tensor>& residual, double out_scale) {
  constexpr const char* op = "group_norm_silu";
  check_group_norm_silu(op, x, weight, bias, groups, x_shift, scale, shift, residual);
  const Layout layout(x, groups);
  const Vectors vectors(weight, bias, x_shift, scale, shift);
  const int64_t per_group[] = {x.size(0), groups};
  Tensor out = empty_like(x, x.scalar_type());
  Tensor mean = torch::stable::new_empty(x, {per_group, 2}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {per_group, 2}, ScalarType::Float);
  float* mean_data = mean.mutable_data_ptr<float>();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  dispatch_floats(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* x_data = x.const_data_ptr<T>();
    const T* residual_data = residual ? residual->const_data_ptr<T>() : nullptr;
    T* out_data = out.mutable_data_ptr<T>();
    layout.for_each_block([&](int64_t image, int64_t first_group, int64_t last_group) {
      forward_block(
          x_data, residual_data, out_data, mean_data, rstd_data, layout, vectors, eps, silu,
          static_cast<float>(out_scale), image, first_group, last_group);
    });
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, int64_t groups, const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, bool silu, double out_scale, bool need_x) {
  constexpr const char* op = "group_norm_silu_backward";
  check_group_norm_silu_backward(op, grad, x, mean, rstd, weight, bias, groups, x_shift, scale, shift);
  const Layout layout(x, groups);
  const Vectors vectors(weight, bias, x_shift, scale, shift);
  const int64_t per_channel[] = {3, x.size(0), x.size(1)};
  Tensor dx = need_x ? empty_like(x, x.scalar_type()) : empty(x, x.scalar_type());
  Tensor sums = torch::stable::new_empty(x, {per_channel, 3}, ScalarType::Float);
  const float* mean_data = mean.const_data_ptr<float>();
  const float* rstd_data = rstd.const_data_ptr<float>();
  float* sums_data = sums.mutable_data_ptr<float>();
  dispatch_floats(op, "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* grad_data = grad.const_data_ptr<T>();
    const T* x_data = x.const_data_ptr<T>();
    T* dx_data = need_x ? dx.mutable_data_ptr<T>() : nullptr;
    layout.for_each_block([&](int64_t image, int64_t first_group, int64_t last_group) {
      backward_block(
          grad_data, x_data, dx_data, mean_data, rstd_data, sums_data, layout, vectors, silu,
          static_cast<float>(out_scale), image, first_group, last_group);
    });
  });
  return {dx, sums};
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace
}  // namespace ctm_fast::cpu
