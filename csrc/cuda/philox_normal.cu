// Counter-based noise in CUDA: one Philox block, four elements, for each thread.
#include "../common/philox.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../common/noise.h"
#include "noise.cuh"

namespace ctm_fast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) words_kernel(
    const int64_t* __restrict__ seeds, int64_t* __restrict__ out, uint32_t step, uint32_t stream, int64_t batch,
    int64_t size) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const Block block = philox4x32(noise_counter(first / 4, step, stream), seeds[sample]);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      if (first + lane < size) {
        out[sample * size + first + lane] = block.words[lane];
      }
    }
  }
}

template <Order order>
__global__ void __launch_bounds__(kThreads) normal_kernel(
    const int64_t* __restrict__ seeds, float* __restrict__ out, uint32_t step, uint32_t stream, int64_t batch,
    Image image) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= image.blocks()) {
    return;
  }
  const Place at = place<order>(thread, image);
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const Normals noise = normals(philox4x32(noise_counter(at.block, step, stream), seeds[sample]));
    store<order>(out + sample * image.size(), at, noise.values);
  }
}

Tensor philox_words(const Tensor& seeds, int64_t step, std::vector<int64_t> shape, int64_t stream) {
  constexpr const char* op = "philox_words";
  check_seeds(op, seeds);
  const torch::stable::accelerator::DeviceGuard guard(seeds.get_device_index());
  Tensor out = empty_noise(op, seeds, shape, ScalarType::Long, false);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t batch = seeds.size(0);
  const int64_t size = out.numel() / batch;
  launch(
      words_kernel, image_grid(batch, (size + 3) / 4), kThreads, 0, seeds,
      seeds.const_data_ptr<int64_t>(), out.mutable_data_ptr<int64_t>(), static_cast<uint32_t>(step),
      static_cast<uint32_t>(stream), batch, size);
  return out;
}

Tensor philox_normal(
    const Tensor& seeds, int64_t step, std::vector<int64_t> shape, int64_t stream, bool channels_last) {
  constexpr const char* op = "philox_normal";
  check_seeds(op, seeds);
  const torch::stable::accelerator::DeviceGuard guard(seeds.get_device_index());
  Tensor out = empty_noise(op, seeds, shape, ScalarType::Float, channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t batch = seeds.size(0);
  const int64_t size = out.numel() / batch;
  const int64_t channels = channels_last ? shape[0] : 1;
  float* out_data = out.mutable_data_ptr<float>();
  const auto kernel = channels_last   ? normal_kernel<Order::kChannelsLast>
      : vectorises<4>(size, out_data) ? normal_kernel<Order::kVectors>
                                      : normal_kernel<Order::kContiguous>;
  launch(
      kernel, image_grid(batch, (size + 3) / 4), kThreads, 0, seeds,
      seeds.const_data_ptr<int64_t>(), out_data, static_cast<uint32_t>(step), static_cast<uint32_t>(stream), batch,
      Image{channels, size / channels});
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CUDA, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}

}  // namespace
}  // namespace ctm_fast::cuda
