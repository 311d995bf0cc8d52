// Sine and cosine of c_noise times each frequency, in CUDA, for one level of each image or for both in one launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>

#include "../common/levels.h"
#include "../common/noise_embed.h"
#include "../common/sin_cos.h"
#include "launch.cuh"

namespace ctm_fast::cuda {
namespace {

// A thread handles N frequencies of one level; row runs over the levels t [batch], then s [batch].
template <int N>
__global__ void __launch_bounds__(kThreads) embed_kernel(
    const float* __restrict__ t, const float* __restrict__ s, const float* __restrict__ freqs, float* __restrict__ out,
    float scale, bool sin_first, int64_t batch, int64_t rows, int64_t half) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (item >= rows * half) {
    return;
  }
  const int64_t row = item / half;
  const int64_t j = item % half;
  const float c = c_noise(row < batch ? t[row] : s[row - batch], scale);
  const auto frequencies = Vector<float, N>::load(freqs + j);
  Vector<float, N> sines;
  Vector<float, N> cosines;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sin_cos(c * frequencies.values[i], sines.values[i], cosines.values[i]);
  }
  float* first = out + row * 2 * half + j;
  sines.store(sin_first ? first : first + half);
  cosines.store(sin_first ? first + half : first);
}

Tensor noise_embed(
    const Tensor& t, const std::optional<Tensor>& s, const Tensor& freqs, double scale, bool sin_first) {
  constexpr const char* op = "noise_embed";
  check_noise_embed(op, t, s, freqs);
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  const int64_t batch = t.size(0);
  const int64_t half = freqs.size(0);
  const std::array<int64_t, 3> sizes{s ? 2 : 1, batch, 2 * half};
  Tensor out = torch::stable::new_empty(t, {sizes.data(), sizes.size()});
  if (out.numel() == 0) {
    return out;
  }
  const int64_t rows = sizes[0] * batch;
  const float* freqs_data = freqs.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  const bool vectors = vectorises<4>(half, freqs_data, out_data);
  const auto kernel = vectors ? embed_kernel<4> : embed_kernel<1>;
  launch(
      kernel, image_grid(1, rows * half / (vectors ? 4 : 1)), kThreads, 0, t,
      t.const_data_ptr<float>(), s ? s->const_data_ptr<float>() : nullptr, freqs_data, out_data,
      static_cast<float>(scale), sin_first, batch, rows, half);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("noise_embed", TORCH_BOX(&noise_embed));
}

}  // namespace
}  // namespace ctm_fast::cuda
