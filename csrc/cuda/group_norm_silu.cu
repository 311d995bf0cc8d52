// Group normalisation, modulation, SiLU and residual in CUDA, and their gradient.
//
// One launch that reads each image once where whole groups of it fit shared memory (group_norm_tile.cuh, and backward in
// channels_last group_norm_tile_backward.cuh); else several, over parts of an image (group_norm_parts.cuh). No atomics: a
// result is the same every time, in every batch.
#include "../common/group_norm_silu.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "group_norm_parts.cuh"
#include "group_norm_tile.cuh"
#include "group_norm_tile_backward.cuh"

namespace ctm_fast::cuda {
namespace {

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
  const Modulation modulation{
      weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), data(x_shift), data(scale), data(shift)};
  float* mean_data = mean.mutable_data_ptr<float>();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  dispatch_images(
      op, x,
      [&](auto type, auto n, auto last) {
        using T = decltype(type);
        constexpr int N = n;
        constexpr bool kLast = last;
        const T* x_data = x.const_data_ptr<T>();
        const T* residual_data = residual ? residual->const_data_ptr<T>() : nullptr;
        T* out_data = out.mutable_data_ptr<T>();
        if constexpr (N > 1) {
          if (const auto fitting = make_tile<T, N, kLast>(kTileForward, batch, channels, pixels, groups)) {
            const auto& [tile, bytes] = *fitting;
            STD_CUDA_CHECK(cudaFuncSetAttribute(
                tile_kernel<T, N, kLast>, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileShared));
            launch(
                tile_kernel<T, N, kLast>, blocks_for(batch * tile.plan.blocks, 1), kThreads, bytes, x, x_data,
                residual_data, modulation, mean_data, rstd_data, out_data, static_cast<float>(eps), silu,
                static_cast<float>(out_scale), tile);
            return;
          }
        }
        const Plan plan = make_plan<N>(batch, channels, pixels, kLast);
        Tensor rows = empty_floats(x, {kForwardRows, batch, channels});
        Tensor partial = empty_floats(x, {batch, plan.chunks, channels, 2});
        float* rows_data = rows.mutable_data_ptr<float>();
        float* partial_data = partial.mutable_data_ptr<float>();
        const dim3 grid = blocks_for(batch * plan.blocks, 1);
        if (plan.blocks > 0) {
          launch(
              moments_kernel<T, N, kLast>, grid, kThreads, kReduceBytes<N, kLast, 3>, x, x_data, partial_data, plan);
        }
        launch(
            merge_kernel, blocks_for(batch * groups, kWarps), kThreads, 0, x, partial_data, modulation, mean_data,
            rstd_data, rows_data, static_cast<float>(eps), groups, plan);
        if (plan.blocks > 0) {
          launch(
              forward_kernel<T, N, kLast>, grid, kThreads, 0, x, x_data, residual_data, rows_data, out_data, silu,
              static_cast<float>(out_scale), plan);
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
  const Modulation modulation{
      weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), data(x_shift), data(scale), data(shift)};
  const float* mean_data = mean.const_data_ptr<float>();
  const float* rstd_data = rstd.const_data_ptr<float>();
  float* sums_data = sums.mutable_data_ptr<float>();
  dispatch_images(
      op, x,
      [&](auto type, auto n, auto last) {
        using T = decltype(type);
        constexpr int N = n;
        constexpr bool kLast = last;
        const T* grad_data = grad.const_data_ptr<T>();
        const T* x_data = x.const_data_ptr<T>();
        T* dx_data = need_x ? dx.mutable_data_ptr<T>() : nullptr;
        if constexpr (N > 1 && kLast) {
          if (const auto fitting = make_tile<T, N, kLast>(kTileBackward, batch, channels, pixels, groups)) {
            const auto& [tile, bytes] = *fitting;
            STD_CUDA_CHECK(cudaFuncSetAttribute(
                tile_backward_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileShared));
            launch(
                tile_backward_kernel<T, N>, blocks_for(batch * tile.plan.blocks, 1), kThreads, bytes, x, grad_data,
                x_data, mean_data, rstd_data, modulation, sums_data, dx_data, silu, static_cast<float>(out_scale),
                tile);
            return;
          }
        }
        const Plan plan = make_plan<N>(batch, channels, pixels, kLast);
        Tensor rows = empty_floats(x, {kBackwardRows, batch, channels});
        Tensor partial = empty_floats(x, {3, batch, plan.chunks, channels});
        float* rows_data = rows.mutable_data_ptr<float>();
        float* partial_data = partial.mutable_data_ptr<float>();
        const dim3 grid = blocks_for(batch * plan.blocks, 1);
        if (plan.blocks > 0) {
          launch(
              affine_kernel, blocks_for(batch * channels, kThreads), kThreads, 0, x, mean_data, rstd_data, modulation,
              rows_data, groups, plan);
          launch(
              sums_kernel<T, N, kLast>, grid, kThreads, kReduceBytes<N, kLast, 3>, x, grad_data, x_data, rows_data,
              partial_data, silu, static_cast<float>(out_scale), plan);
        }
        launch(
            merge_sums_kernel, blocks_for(batch * groups, kWarps), kThreads, 0, x, partial_data, rstd_data, modulation,
            sums_data, rows_data, groups, plan);
        if (plan.blocks > 0 && need_x) {
          launch(
              backward_kernel<T, N, kLast>, grid, kThreads, 0, x, grad_data, x_data, rows_data, dx_data, silu,
              static_cast<float>(out_scale), plan);
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
