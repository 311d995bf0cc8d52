// SiLU and its derivative in float32, without a branch, a table or a call, so that a loop over them vectorises.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#include "bits.h"

namespace ctm_fast {

// e^x to 1 ulp, subnormal results included; 0 below -104, infinite above 88.73. NaN gives NaN.
//   x = k ln 2 + r, |r| <= ln 2 / 2;   e^r = 1 + r + r^2 Q(r), Q minimax to 3e-9
C10_HOST_DEVICE inline float exp_float(float x) {
  constexpr float kRound = 0x1.8p23f;  // added to a float, it leaves the nearest integer in the lowest bits
  // ln 2 in two parts: k times the first, of 16 bits, is exact.
  constexpr float kLn2High = 0x1.62e4p-1f;
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  x = x > 89.0f ? 89.0f : x;  // NaN compares false, and stays
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * 1.4426950408889634f + kRound;
  const int32_t k = static_cast<int32_t>(float_bits(shifted) - float_bits(kRound));
  const float whole = shifted - kRound;
  const float r = (x - whole * kLn2High) - whole * kLn2Low;
  float q = 0.0013814433477818966f;
  q = q * r + 0.008368796668946743f;
  q = q * r + 0.041668396443128586f;
  q = q * r + 0.1666651964187622f;
  q = q * r + 0.4999999403953552f;
  const float power = 1.0f + (r + r * r * q);
  // 2^k in two factors: k = 128 and k < -126 are no exponents of a normal float.
  const int32_t half = k >> 1;
  return power * float_from_bits(static_cast<uint32_t>(half + 127) << 23) *
         float_from_bits(static_cast<uint32_t>(k - half + 127) << 23);
}

C10_HOST_DEVICE inline float sigmoid(float z) {
  return 1.0f / (1.0f + exp_float(-z));
}

// z / (1 + e^-z) to 2 ulp; -0 where e^-z overflows, z < -88.72, of a true value within 3e-37.
C10_HOST_DEVICE inline float silu(float z) {
  return z / (1.0f + exp_float(-z));
}

C10_HOST_DEVICE inline float silu_derivative(float z) {
  const float s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

}  // namespace ctm_fast
