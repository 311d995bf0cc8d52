// What the CPU and the CUDA noise kernels share on the host: the checks of seeds, and the output's shape.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace ctm_fast {

// One 64-bit key for each sample: int64 [B], contiguous.
inline void check_seeds(const char* op, const Tensor& seeds) {
  STD_TORCH_CHECK(seeds.dim() == 1, op, ": seeds: expected shape [B], got ", to_string(seeds.sizes()));
  check_dtype(op, "seeds", seeds, ScalarType::Long);
  check_contiguous(op, "seeds", seeds);
}

// One for each image, on their device.
inline void check_seeds(const char* op, const Tensor& seeds, const Tensor& images) {
  const int64_t batch = images.size(0);
  check_seeds(op, seeds);
  check_shape(op, "seeds", seeds, {&batch, 1});
  check_device(op, "seeds", seeds, images);
}

// An uninitialised [B, *shape] of `dtype` on the seeds' device.
inline Tensor empty_noise(
    const char* op, const Tensor& seeds, const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last) {
  STD_TORCH_CHECK(
      !channels_last || shape.size() == 3, op, ": shape: expected (C, H, W) with channels_last, got ",
      to_string(shape));
  std::vector<int64_t> sizes{seeds.size(0)};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  using torch::headeronly::MemoryFormat;
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(sizes, dtype, std::nullopt, seeds.device(), std::nullopt, format);
}

}  // namespace ctm_fast
