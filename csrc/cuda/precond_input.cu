// c_in(t) x in CUDA, from any of the three float dtypes to any: the op is its own gradient, with the dtypes exchanged.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../common/levels.h"
#include "../common/precond_input.h"
#include "../common/tensor.h"
#include "launch.cuh"

namespace ctm_fast::cuda {
namespace {

template <typename In, typename Out, int N>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const In* __restrict__ x, const float* __restrict__ t, Out* __restrict__ out, float sigma_data, int64_t batch,
    int64_t size) {
  const int64_t within = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (within >= size) {
    return;
  }
  for (int64_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const float scale = c_in(t[image], sigma_data);
    const int64_t offset = image * size + within;
    const auto values = Vector<In, N>::load(x + offset);
    Vector<Out, N> scaled;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scaled.values[i] = static_cast<Out>(scale * static_cast<float>(values.values[i]));
    }
    scaled.store(out + offset);
  }
}

Tensor precond_input(const Tensor& x, const Tensor& t, double sigma_data, ScalarType dtype) {
  constexpr const char* op = "precond_input";
  check_precond_input(op, x, t);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = empty_like(x, dtype);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const int64_t size = x.numel() / batch;
  dispatch_floats(op, "x", x.scalar_type(), [&](auto in_type) {
    dispatch_floats(op, "dtype", dtype, [&](auto out_type) {
      using In = decltype(in_type);
      using Out = decltype(out_type);
      const In* x_data = x.const_data_ptr<In>();
      Out* out_data = out.mutable_data_ptr<Out>();
      constexpr int N = std::max(kVector<In>, kVector<Out>);
      const bool vectors = vectorises<N>(size, x_data, out_data);
      const auto kernel = vectors ? scale_kernel<In, Out, N> : scale_kernel<In, Out, 1>;
      launch(
          kernel, image_grid(batch, vectors ? size / N : size), kThreads, 0, x,
          x_data, t.const_data_ptr<float>(), out_data, static_cast<float>(sigma_data), batch, size);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("precond_input", TORCH_BOX(&precond_input));
}

}  // namespace
}  // namespace ctm_fast::cuda
