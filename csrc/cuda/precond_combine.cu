// G_x = a x + b F_x in CUDA, and its gradient (a grad, b grad); a and b follow from each image's levels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/levels.h"
#include "../common/precond_combine.h"
#include "../common/tensor.h"
#include "launch.cuh"

namespace ctm_fast::cuda {
namespace {

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const float* __restrict__ x, const T* __restrict__ F_x, const float* __restrict__ t, const float* __restrict__ s,
    float* __restrict__ out, float sigma_data, int64_t batch, int64_t size) {
  const int64_t within = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (within >= size) {
    return;
  }
  for (int64_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const JumpWeights weights = jump_weights(t[image], s[image], sigma_data);
    const int64_t offset = image * size + within;
    const auto x_values = Vector<float, N>::load(x + offset);
    const auto F_values = Vector<T, N>::load(F_x + offset);
    Vector<float, N> G_values;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      G_values.values[i] = weights.x * x_values.values[i] + weights.F * static_cast<float>(F_values.values[i]);
    }
    G_values.store(out + offset);
  }
}

// grad_x or grad_F is null where nobody needs it.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const float* __restrict__ grad, const float* __restrict__ t, const float* __restrict__ s,
    float* __restrict__ grad_x, T* __restrict__ grad_F, float sigma_data, int64_t batch, int64_t size) {
  const int64_t within = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (within >= size) {
    return;
  }
  for (int64_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const JumpWeights weights = jump_weights(t[image], s[image], sigma_data);
    const int64_t offset = image * size + within;
    const auto values = Vector<float, N>::load(grad + offset);
    if (grad_x != nullptr) {
      Vector<float, N> scaled;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scaled.values[i] = weights.x * values.values[i];
      }
      scaled.store(grad_x + offset);
    }
    if (grad_F != nullptr) {
      Vector<T, N> scaled;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scaled.values[i] = static_cast<T>(weights.F * values.values[i]);
      }
      scaled.store(grad_F + offset);
    }
  }
}

Tensor precond_combine(const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s, double sigma_data) {
  constexpr const char* op = "precond_combine";
  check_precond_combine(op, x, F_x, t, s);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty_like(x, ScalarType::Float);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const int64_t size = x.numel() / batch;
  const float* x_data = x.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  dispatch_floats(op, "F_x", F_x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* F_data = F_x.const_data_ptr<T>();
    constexpr int N = kVector<T>;
    const bool vectors = vectorises<N>(size, x_data, F_data, out_data);
    const auto kernel = vectors ? forward_kernel<T, N> : forward_kernel<T, 1>;
    launch(
        kernel, image_grid(batch, vectors ? size / N : size), kThreads, 0, x,
        x_data, F_data, t.const_data_ptr<float>(), s.const_data_ptr<float>(), out_data,
        static_cast<float>(sigma_data), batch, size);
  });
  return out;
}

std::tuple<Tensor, Tensor> precond_combine_backward(
    const Tensor& grad, const Tensor& t, const Tensor& s, double sigma_data, ScalarType F_dtype, bool need_x,
    bool need_F) {
  constexpr const char* op = "precond_combine_backward";
  check_precond_combine_backward(op, grad, t, s);

  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  Tensor grad_x = need_x ? empty_like(grad, ScalarType::Float) : empty(grad, ScalarType::Float);
  Tensor grad_F = need_F ? empty_like(grad, F_dtype) : empty(grad, F_dtype);
  if (grad.numel() == 0 || !(need_x || need_F)) {
    return {grad_x, grad_F};
  }
  const int64_t batch = grad.size(0);
  const int64_t size = grad.numel() / batch;
  const float* grad_data = grad.const_data_ptr<float>();
  float* grad_x_data = need_x ? grad_x.mutable_data_ptr<float>() : nullptr;
  dispatch_floats(op, "F_dtype", F_dtype, [&](auto type) {
    using T = decltype(type);
    T* grad_F_data = need_F ? grad_F.mutable_data_ptr<T>() : nullptr;
    constexpr int N = kVector<T>;
    const bool vectors = vectorises<N>(size, grad_data, grad_x_data, grad_F_data);
    const auto kernel = vectors ? backward_kernel<T, N> : backward_kernel<T, 1>;
    launch(
        kernel, image_grid(batch, vectors ? size / N : size), kThreads, 0, grad,
        grad_data, t.const_data_ptr<float>(), s.const_data_ptr<float>(), grad_x_data, grad_F_data,
        static_cast<float>(sigma_data), batch, size);
  });
  return {grad_x, grad_F};
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("precond_combine", TORCH_BOX(&precond_combine));
  m.impl("precond_combine_backward", TORCH_BOX(&precond_combine_backward));
}

}  // namespace
}  // namespace ctm_fast::cuda
