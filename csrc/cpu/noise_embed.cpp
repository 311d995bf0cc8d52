// Sine and cosine of c_noise times each frequency, on the CPU, for one level of each image or for both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>

#include "../common/levels.h"
#include "../common/noise_embed.h"
#include "../common/sin_cos.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

constexpr int64_t kGrain = 4096;  // pairs of sine and cosine worth a thread of their own

CTM_FAST_WIDEST void embed(float c_noise, const float* __restrict__ freqs, float* __restrict__ sines,
                           float* __restrict__ cosines, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    sin_cos(c_noise * freqs[j], sines[j], cosines[j]);
  }
}

Tensor noise_embed(
    const Tensor& t, const std::optional<Tensor>& s, const Tensor& freqs, double scale, bool sin_first) {
  constexpr const char* op = "noise_embed";
  check_noise_embed(op, t, s, freqs);
  const int64_t batch = t.size(0);
  const int64_t half = freqs.size(0);
  const std::array<int64_t, 3> sizes{s ? 2 : 1, batch, 2 * half};
  Tensor out = torch::stable::new_empty(t, {sizes.data(), sizes.size()});
  if (out.numel() == 0) {
    return out;
  }
  const float* t_data = t.const_data_ptr<float>();
  const float* s_data = s ? s->const_data_ptr<float>() : nullptr;
  const float* freqs_data = freqs.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, sizes[0] * batch, std::max<int64_t>(1, kGrain / half), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float level = row < batch ? t_data[row] : s_data[row - batch];
      float* first = out_data + row * 2 * half;
      float* second = first + half;
      embed(c_noise(level, static_cast<float>(scale)), freqs_data, sin_first ? first : second,
            sin_first ? second : first, half);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("noise_embed", TORCH_BOX(&noise_embed));
}

}  // namespace
}  // namespace ctm_fast::cpu
