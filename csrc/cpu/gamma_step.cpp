// Jump and re-noising on the CPU: x_next = a x + b F_x + std n, the noise made run by run in the cache.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../common/gamma_step.h"
#include "../common/levels.h"
#include "../common/philox.h"
#include "../common/tensor.h"
#include "noise.h"

namespace ctm_fast::cpu {
namespace {

Tensor gamma_step(
    const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s, const Tensor& t_next, const Tensor& seeds,
    int64_t step, int64_t stream, double sigma_data) {
  constexpr const char* op = "gamma_step";
  check_gamma_step(op, x, F_x, t, s, t_next, seeds);

  Tensor out = empty_like(x, ScalarType::Float);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const Noise noise{seeds.const_data_ptr<int64_t>(), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
  const float* x_data = x.const_data_ptr<float>();
  const float* t_data = t.const_data_ptr<float>();
  const float* s_data = s.const_data_ptr<float>();
  const float* next_data = t_next.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  dispatch_floats(op, "F_x", F_x.scalar_type(), [&](auto type) {
    const auto* F_data = F_x.const_data_ptr<decltype(type)>();
    const auto combine = [=](int64_t image, int64_t begin, int64_t count, const float* values) {
      const JumpWeights weights = jump_weights(t_data[image], s_data[image], static_cast<float>(sigma_data));
      const float std = renoise_std(s_data[image], next_data[image]);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = begin + i;
        const float jump = weights.x * x_data[at] + weights.F * static_cast<float>(F_data[at]);
        out_data[at] = jump + std * values[i];
      }
    };
    if (x.is_contiguous()) {
      noise.for_each_run(batch, x.numel() / batch, combine);
    } else {
      noise.for_each_run_channels_last(batch, x.size(1), x.size(2) * x.size(3), combine);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("gamma_step", TORCH_BOX(&gamma_step));
}

}  // namespace
}  // namespace ctm_fast::cpu
