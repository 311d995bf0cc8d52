// What the ways of group_norm_silu share: the affine map that normalisation and modulation make of a channel, and SiLU.
#pragma once

#include "group_norm.cuh"

namespace ctm_fast::cuda {
namespace {

// Three blocks of 256 threads on a multiprocessor, 80 registers for a thread: 24 of its 64 (sm_80, sm_90) warps, each
// with kInFlight loads of 16 bytes a lane under way, are more than its share of the bandwidth times the latency.
#define CTM_FAST_STREAMING __launch_bounds__(kThreads, 3)

// Two, 128 registers: 48 of them hold what eight channels add up and are made of.
#define CTM_FAST_SUMMING __launch_bounds__(kThreads, 2)

constexpr int kWarps = kThreads / kWarp;

// z = (x - centre) gain + offset
struct Affine {
  float centre;
  float gain;
  float offset;
};

struct Modulation {
  const float* weight;
  const float* bias;
  const float* x_shift;
  const float* scale;
  const float* shift;

  // Of channel `channel`, number `at` of all the samples' channels.
  __device__ float factor(int64_t at) const { return scale == nullptr ? 1.0f : 1.0f + scale[at]; }
  __device__ float moved(int64_t at) const { return x_shift == nullptr ? 0.0f : x_shift[at]; }

  __device__ Affine affine(float mean, float rstd, int64_t channel, int64_t at) const {
    return {
        mean - moved(at), rstd * weight[channel] * factor(at),
        bias[channel] * factor(at) + (shift == nullptr ? 0.0f : shift[at])};
  }
};

// Not IEEE's division and expf, which take as many cycles as a memory-bound kernel has: two ulp more.
__device__ float sigmoid(float z) {
  return __fdividef(1.0f, 1.0f + __expf(-z));
}

// The gradient before SiLU, from that of y; apart = x - centre.
__device__ float before_silu(float grad, float apart, float gain, float offset, bool silu, float out_scale) {
  const float g = grad * out_scale;
  if (!silu) {
    return g;
  }
  const float z = apart * gain + offset;
  const float s = sigmoid(z);
  return g * s * (1.0f + z * (1.0f - s));
}

}  // namespace
}  // namespace ctm_fast::cuda
