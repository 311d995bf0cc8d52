// Jump and re-noising in CUDA: x_next = a x + b F_x + std n in one pass, the noise made in registers.
#include "../common/philox.h"

#include <torch/csrc/stable/library.h>

#include "../common/gamma_step.h"
#include "../common/levels.h"
#include "../common/tensor.h"
#include "noise.cuh"

namespace ctm_fast::cuda {
namespace {

template <typename T, Order order>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const float* __restrict__ x, const T* __restrict__ F_x, const float* __restrict__ t, const float* __restrict__ s,
    const float* __restrict__ t_next, const int64_t* __restrict__ seeds, float* __restrict__ out, uint32_t step,
    uint32_t stream, float sigma_data, int64_t batch, Image image) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= image.blocks()) {
    return;
  }
  const Place at = place<order>(thread, image);
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const JumpWeights weights = jump_weights(t[sample], s[sample], sigma_data);
    const float std = renoise_std(s[sample], t_next[sample]);
    const int64_t offset = sample * image.size();
    float x_values[4], F_values[4], next[4];
    load<order>(x + offset, at, x_values);
    load<order>(F_x + offset, at, F_values);
    const Normals noise = normals(philox4x32(noise_counter(at.block, step, stream), seeds[sample]));
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const float jump = weights.x * x_values[lane] + weights.F * F_values[lane];
      next[lane] = jump + std * noise.values[lane];
    }
    store<order>(out + offset, at, next);
  }
}

Tensor gamma_step(
    const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s, const Tensor& t_next, const Tensor& seeds,
    int64_t step, int64_t stream, double sigma_data) {
  constexpr const char* op = "gamma_step";
  check_gamma_step(op, x, F_x, t, s, t_next, seeds);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty_like(x, ScalarType::Float);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const Image image{x.size(1), x.size(2) * x.size(3)};
  const float* x_data = x.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  dispatch_floats(op, "F_x", F_x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* F_data = F_x.const_data_ptr<T>();
    const bool vectors = vectorises<4>(image.size(), x_data, F_data, out_data);
    const auto kernel = !x.is_contiguous() ? forward_kernel<T, Order::kChannelsLast>
        : vectors                          ? forward_kernel<T, Order::kVectors>
                                           : forward_kernel<T, Order::kContiguous>;
    launch(
        kernel, image_grid(batch, image.blocks()), kThreads, 0, x,
        x_data, F_data, t.const_data_ptr<float>(), s.const_data_ptr<float>(), t_next.const_data_ptr<float>(),
        seeds.const_data_ptr<int64_t>(), out_data, static_cast<uint32_t>(step), static_cast<uint32_t>(stream),
        static_cast<float>(sigma_data), batch, image);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("gamma_step", TORCH_BOX(&gamma_step));
}

}  // namespace
}  // namespace ctm_fast::cuda
