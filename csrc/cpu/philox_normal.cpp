// Counter-based noise on the CPU: many Philox blocks at once, as wide as the machine's vectors.
#include "../common/philox.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../common/noise.h"
#include "noise.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

constexpr int kBlocks = 64;

// The normals of blocks index to index + count - 1, count <= kBlocks. Every width of vectors gives the same bits,
// because no multiplication is contracted with an addition (CMakeLists.txt).
CTM_FAST_WIDEST void normal_blocks(
    uint64_t seed, uint32_t step, uint32_t stream, uint64_t index, int count, float* out) {
  for (int i = 0; i < count; ++i) {
    const Normals four = normals(philox4x32(noise_counter(index + i, step, stream), seed));
    for (int lane = 0; lane < 4; ++lane) {
      out[4 * i + lane] = four.values[lane];
    }
  }
}

Tensor philox_words(const Tensor& seeds, int64_t step, std::vector<int64_t> shape, int64_t stream) {
  constexpr const char* op = "philox_words";
  check_seeds(op, seeds);
  Tensor out = empty_noise(op, seeds, shape, ScalarType::Long, false);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t batch = seeds.size(0);
  const int64_t size = out.numel() / batch;
  const int64_t* seeds_data = seeds.const_data_ptr<int64_t>();
  int64_t* out_data = out.mutable_data_ptr<int64_t>();
  for_each_image(batch, size, [=](int64_t image, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t element = i - image * size;
      const Block block = philox4x32(noise_counter(element / 4, step, stream), seeds_data[image]);
      for (int64_t lane = element % 4; lane < 4 && i < end; ++lane) {
        out_data[i++] = block.words[lane];
      }
    }
  });
  return out;
}

Tensor philox_normal(
    const Tensor& seeds, int64_t step, std::vector<int64_t> shape, int64_t stream, bool channels_last) {
  constexpr const char* op = "philox_normal";
  check_seeds(op, seeds);
  Tensor out = empty_noise(op, seeds, shape, ScalarType::Float, channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const int64_t batch = seeds.size(0);
  const int64_t size = out.numel() / batch;
  const Noise noise{seeds.const_data_ptr<int64_t>(), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  float* out_data = out.mutable_data_ptr<float>();
  const auto copy = [=](int64_t, int64_t begin, int64_t count, const float* values) {
    std::copy_n(values, count, out_data + begin);
  };
  if (channels_last) {
    noise.for_each_run_channels_last(batch, shape[0], size / shape[0], copy);
  } else {
    noise.for_each_run(batch, size, copy);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}

}  // namespace

void normal_run(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t count, float* out) {
  float values[4 * kBlocks];
  while (count > 0) {
    const int64_t skip = first % 4;
    const int64_t taken = std::min<int64_t>(count, 4 * kBlocks - skip);
    normal_blocks(seed, step, stream, first / 4, static_cast<int>((skip + taken + 3) / 4), values);
    std::copy_n(values + skip, taken, out);
    first += taken;
    out += taken;
    count -= taken;
  }
}

}  // namespace ctm_fast::cpu
