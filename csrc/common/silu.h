// SiLU and its derivative in float32, without a branch, a table or a call, so that a loop over them vectorises.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "bits.h"

namespace ctm_fast {

// e^x to 1 ulp, as a sigmoid needs it: 0 below -87.7, infinite above 88.4, and something finite or infinite for NaN.
//   x = k ln 2 + r, |r| <= ln 2 / 2;   e^r = 1 + r + r^2 Q(r), Q minimax to 3e-9
// Bounds are set on integers: on floats a compiler makes branches of them, and computes what follows once for each.
C10_HOST_DEVICE inline float exp_bounded(float x) {
  constexpr float kRound = 0x1.8p23f;  // added to a float, it leaves the nearest integer in the lowest bits
  // ln 2 in two parts: k times the first, of 16 bits, is exact.
  constexpr float kLn2High = 0x1.62e4p-1f;
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  constexpr int32_t kBound = 0x42b20000;  // 89, so that -128 <= k <= 128
  const int32_t bits = static_cast<int32_t>(float_bits(x));
  const int32_t size = bits & 0x7fffffff;
  const int32_t bounded = size < kBound ? size : kBound;
  x = float_from_bits(static_cast<uint32_t>(bounded | (bits & INT32_MIN)));
  const float shifted = fmaf(x, 1.4426950408889634f, kRound);
  const float whole = shifted - kRound;
  const float r = fmaf(-whole, kLn2Low, fmaf(-whole, kLn2High, x));
  float q = 0.0013814433477818966f;
  q = fmaf(q, r, 0.008368796668946743f);
  q = fmaf(q, r, 0.041668396443128586f);
  q = fmaf(q, r, 0.1666651964187622f);
  q = fmaf(q, r, 0.4999999403953552f);
  const float power = fmaf(fmaf(q, r, 1.0f), r, 1.0f);
  // The exponent field of 2^k: 255, which is infinity, for k = 128, and 0, which is 0, for k < -126.
  const int32_t field = static_cast<int32_t>(float_bits(shifted)) - (0x4b400000 - 127);
  return power * float_from_bits(static_cast<uint32_t>(field > 0 ? field : 0) << 23);
}

C10_HOST_DEVICE inline float sigmoid(float z) {
  return 1.0f / (1.0f + exp_bounded(-z));
}

// z / (1 + e^-z) to 2.3 ulp; -0 for z < -88.4, of a true value within 4e-37.
C10_HOST_DEVICE inline float silu(float z) {
  return z / (1.0f + exp_bounded(-z));
}

C10_HOST_DEVICE inline float silu_derivative(float z) {
  const float s = sigmoid(z);
  return s * fmaf(z, 1.0f - s, 1.0f);
}

}  // namespace ctm_fast
