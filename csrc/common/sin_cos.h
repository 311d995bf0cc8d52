// Sine and cosine at once, in a form that compilers vectorise: the C library's sincosf takes one angle at a time, and
// CUDA's keeps a table on the stack for large angles.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <cstring>

namespace ctm_fast {

// Sine and cosine to an ulp while |angle| < 2^30. The angle less its multiple of pi / 2 is taken in double precision,
// and lies within pi / 4, where the Taylor series to x^9 and x^8 are exact to half an ulp.
C10_HOST_DEVICE inline void sin_cos(float angle, float& sine, float& cosine) {
  constexpr double kHalfPi = 1.57079632679489661923;
  constexpr double kRound = 0x1.8p52;  // added to a double, it leaves the nearest integer in the lowest bits
  const double shifted = angle * (1 / kHalfPi) + kRound;
  int64_t quadrant;
  std::memcpy(&quadrant, &shifted, sizeof quadrant);
  const float x = static_cast<float>(angle - (shifted - kRound) * kHalfPi);
  const float y = x * x;
  const float s = x + x * y * (-1 / 6.0f + y * (1 / 120.0f + y * (-1 / 5040.0f + y * (1 / 362880.0f))));
  const float c = 1 + y * (-1 / 2.0f + y * (1 / 24.0f + y * (-1 / 720.0f + y * (1 / 40320.0f))));
  const float first = quadrant & 1 ? c : s;
  const float second = quadrant & 1 ? s : c;
  sine = quadrant & 2 ? -first : first;
  cosine = (quadrant + 1) & 2 ? -second : second;
}

}  // namespace ctm_fast
