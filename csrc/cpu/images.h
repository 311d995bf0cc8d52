// Threads over a batch of dense images, for kernels that know one set of weights per image.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace ctm_fast::cpu {

// Elements worth a thread of their own: below, waking one costs more than the work.
constexpr int64_t kGrain = 32768;

// Calls f(image, begin, end) over every element of `batch` images of `size` elements; begin and end are offsets into
// the whole batch and lie in one image. The ranges do not depend on each other, so the result does not on the threads.
template <typename F>
void for_each_image(int64_t batch, int64_t size, const F& f) {
  torch::stable::parallel_for(0, batch * size, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / size;
      const int64_t stop = std::min(end, (image + 1) * size);
      f(image, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace ctm_fast::cpu
