// Stands for CUDA's header of that name where a host compiler builds csrc/cuda/*.cu, so that tests run the very kernels
// on a CPU: see README.md. A kernel that uses something else of CUDA does not compile; add it here, with its contract.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Fits `extern __shared__ T name[]` alone: a static array would be every thread's own, and does not compile.
#define __shared__ __attribute__((section("cuda_shared")))

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs: one runs at a time.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared_memory(const void* kernel, int bytes);

// Waits until every lane of `mask` has given a value of `bytes` bytes, at most 16, and fetches that of lane `from`.
void exchange(unsigned mask, const void* value, void* fetched, size_t bytes, unsigned from);
unsigned lane();

template <typename T>
T exchange(unsigned mask, T value, unsigned from) {
  T fetched;
  exchange(mask, &value, &fetched, sizeof(T), from);
  return fetched;
}

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return [&](Parameters... coerced) {
    return cuda_on_cpu::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(coerced...); });
  }(std::forward<Arguments>(arguments)...);
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  return cuda_on_cpu::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
}

void __syncthreads();

// A lane out of the segment of `width` lanes gets its own value, as the hardware has it.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned from = lane ^ static_cast<unsigned>(lanes);
  return cuda_on_cpu::exchange(mask, value, from < (lane & ~(width - 1)) + width ? from : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned from = lane + delta;
  return cuda_on_cpu::exchange(mask, value, from < (lane & ~(width - 1)) + width ? from : lane);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  return cuda_on_cpu::exchange(mask, value, (cuda_on_cpu::lane() & ~(width - 1)) + (from & (width - 1)));
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::lane());
}

template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

// Fast on a GPU, to some ulp; here as exact as the C library.
inline float __expf(float x) {
  return expf(x);
}

inline float __fdividef(float a, float b) {
  return a / b;
}
