// Philox4x32-10 and the normals it gives, in float32: written once, for the CPU and the CUDA kernels.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "bits.h"

namespace ctm_fast {

// Four 32-bit words: a counter, or what Philox makes of it.
struct Block {
  uint32_t words[4];
};

struct Normals {
  float values[4];
};

struct SinCos {
  float sin;
  float cos;
};

// The counter of elements 4 * index to 4 * index + 3 of a sample.
C10_HOST_DEVICE inline Block noise_counter(uint64_t index, uint32_t step, uint32_t stream) {
  return {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), step, stream}};
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is a seed, its low word first.
C10_HOST_DEVICE inline Block philox4x32(Block counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#else
#pragma GCC unroll 10  // so that a loop over counters vectorises
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ((r >> 8) + 1/2) 2^-24 in float32: 2^-25 to 1, both included.
C10_HOST_DEVICE inline float uniform(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 8)) + 0.5f) * 0x1p-24f;
}

// a b rounded to float32, never the unrounded half of a fused multiply-add. The CPU kernels have -ffp-contract=off.
C10_HOST_DEVICE inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// ln(u) of a positive normal number, to 0.9 ulp; tests/ops/test_philox_normal.py tries every u. No branch and no table,
// unlike logf, so that a loop vectorises and a CUDA thread needs no stack.
//   u = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2);   ln(1 + f) = f - f^2 / 2 + f^3 P(f), P minimax
C10_HOST_DEVICE inline float log_normal_number(float u) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3;
  const uint32_t bits = float_bits(u) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = float_from_bits((bits & 0x007fffff) + kSqrtHalf) - 1.0f;
  float p = -0.07634497433900833f;
  p = p * f + 0.1276157796382904f;
  p = p * f - 0.13160182535648346f;
  p = p * f + 0.14201757311820984f;
  p = p * f - 0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f - 0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const float square = f * f;
  // ln 2 in two parts: e times the first, of 16 bits, is exact.
  constexpr float kLn2High = 0x1.62e4p-1f;
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  return ((square * f * p + e * kLn2Low) - 0.5f * square + f) + e * kLn2High;
}

// Sine and cosine of 0 <= theta <= 2 pi, to 2^-23, in float32 throughout; sin_cos.h takes any angle, in float64.
//   theta = q pi / 2 + r, |r| <= pi / 4;   sin(r) = r + r^3 S(r^2),  cos(r) = 1 - r^2 / 2 + r^4 C(r^2), minimax
C10_HOST_DEVICE inline SinCos sin_cos_turn(float theta) {
  const int32_t quarter = static_cast<int32_t>(theta * 0.6366197723675814f + 0.5f);
  const float q = static_cast<float>(quarter);
  // pi / 2 in two parts: q <= 4 times the first, of 20 bits, is exact, and so is its difference from theta.
  const float r = (theta - q * 0x1.921fap+0f) - q * 0x1.54442ep-20f;
  const float square = r * r;
  float s = -0.00019517235341481864f;
  s = s * square + 0.008332177996635437f;
  s = s * square - 0.16666655242443085f;
  s = r + r * square * s;
  float c = 2.4438379114144482e-05f;
  c = c * square - 0.0013887366512790322f;
  c = c * square + 0.04166664555668831f;
  c = (1.0f - 0.5f * square) + square * square * c;
  const float sine = quarter & 1 ? c : s;
  const float cosine = quarter & 1 ? s : c;
  return {quarter & 2 ? -sine : sine, (quarter + 1) & 2 ? -cosine : cosine};
}

// Box-Muller on words (0, 1) and (2, 3).
C10_HOST_DEVICE inline Normals normals(Block block) {
  Normals result;
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(-2.0f * log_normal_number(uniform(block.words[pair])));
    const SinCos turn = sin_cos_turn(product(6.283185307179586f, uniform(block.words[pair + 1])));
    result.values[pair] = radius * turn.cos;
    result.values[pair + 1] = radius * turn.sin;
  }
  return result;
}

// Standard deviation of the noise that takes an image from level s up to t_next.
C10_HOST_DEVICE inline float renoise_std(float s, float t_next) {
  return sqrtf((t_next - s) * (t_next + s));
}

}  // namespace ctm_fast
