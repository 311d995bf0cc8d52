// Noise for a batch of dense images, run by run in the order of their memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "images.h"

namespace ctm_fast::cpu {

// Elements of a run: its noise stays in the first-level cache until it is used.
constexpr int64_t kRun = 1024;

// out[i] = the normal of element first + i of a sample, 0 <= i < count; in philox_normal.cpp.
void normal_run(uint64_t seed, uint32_t step, uint32_t stream, int64_t first, int64_t count, float* out);

struct Noise {
  const int64_t* seeds;
  uint32_t step;
  uint32_t stream;

  // Calls f(image, begin, count, values) for runs that cover a batch of contiguous images of `size` elements:
  // values[i] is the noise of the element at offset begin + i of the batch.
  template <typename F>
  void for_each_run(int64_t batch, int64_t size, const F& f) const {
    for_each_image(batch, size, [&](int64_t image, int64_t begin, int64_t end) {
      float values[kRun];
      for (; begin < end; begin += kRun) {
        const int64_t count = std::min(kRun, end - begin);
        normal_run(seeds[image], step, stream, begin - image * size, count, values);
        f(image, begin, count, values);
      }
    });
  }

  // The same for channels_last images: the noise of a few pixels is made channel by channel, where its elements are
  // neighbours, and transposed.
  template <typename F>
  void for_each_run_channels_last(int64_t batch, int64_t channels, int64_t pixels, const F& f) const {
    const int64_t tile = std::max<int64_t>(kRun / channels, 64);
    for_each_image(batch, pixels, [&](int64_t image, int64_t begin, int64_t end) {
      std::vector<float> channel(tile);
      std::vector<float> values(tile * channels);
      for (; begin < end; begin += tile) {
        const int64_t count = std::min(tile, end - begin);
        for (int64_t c = 0; c < channels; ++c) {
          normal_run(seeds[image], step, stream, c * pixels + begin - image * pixels, count, channel.data());
          for (int64_t i = 0; i < count; ++i) {
            values[i * channels + c] = channel[i];
          }
        }
        f(image, begin * channels, count * channels, values.data());
      }
    });
  }
};

}  // namespace ctm_fast::cpu
