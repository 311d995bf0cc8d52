// The coefficients that noise levels give, in float32: written once, for the CPU and the CUDA kernels.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>

namespace ctm_fast {

// EDM (arXiv 2206.00364), Table 1.
C10_HOST_DEVICE inline float c_skip(float sigma, float sigma_data) {
  return sigma_data * sigma_data / (sigma * sigma + sigma_data * sigma_data);
}

C10_HOST_DEVICE inline float c_out(float sigma, float sigma_data) {
  return sigma * sigma_data / sqrtf(sigma * sigma + sigma_data * sigma_data);
}

C10_HOST_DEVICE inline float c_in(float sigma, float sigma_data) {
  return 1.0f / sqrtf(sigma * sigma + sigma_data * sigma_data);
}

// What a network is told of its noise level: scale 1/4 is EDM's c_noise, 250 that of its ADM form.
C10_HOST_DEVICE inline float c_noise(float sigma, float scale) {
  return scale * logf(sigma);
}

// The jump from t to s as one combination, G_x = x * weights.x + F_x * weights.F, of
//   g_x = c_skip(t) x + c_out(t) F_x
//   G_x = (s / t) x + (1 - s / t) g_x        CTM (arXiv 2310.02279), Sec. 3
struct JumpWeights {
  float x;
  float F;
};

// 1 - s / t is computed as (t - s) / t, which keeps its digits where s is close to t.
C10_HOST_DEVICE inline JumpWeights jump_weights(float t, float s, float sigma_data) {
  const float step = (t - s) / t;
  return {s / t + step * c_skip(t, sigma_data), step * c_out(t, sigma_data)};
}

}  // namespace ctm_fast
