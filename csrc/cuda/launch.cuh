// What the CUDA rows share: how a kernel is launched, 128-bit loads and stores, and the grid over a batch of images.
// No chevrons, and no static shared memory: tests/cuda_on_cpu runs these sources on a CPU as they are.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace ctm_fast::cuda {

// Threads of a block. Planned are six blocks on a multiprocessor, at 40 registers a thread, or what a row says of its
// own: 48 of 64 warps. tests/cuda_sass.py holds the compiler to it.
constexpr int kThreads = 256;

// The current stream of the tensor's device, on which every kernel is launched (under a DeviceGuard of that device).
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches `kernel` on the tensor's device and current stream, with `shared_bytes` of dynamic shared memory for a block.
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, const torch::stable::Tensor& tensor,
    Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream(tensor);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];

// The dynamic shared memory of a block, as an array of T.
template <typename T>
__device__ inline T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

template <size_t bytes>
using Word = std::conditional_t<
    bytes % 16 == 0, uint4, std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

// N values that a thread handles at once, in as few 128-bit transactions as they take. Stored word by word and by the
// intrinsic: for sm_90 the compiler makes an assignment into four 32-bit stores as often as not (tests/test_cuda_sass.py).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T values[N];

  using Words = Word<sizeof(T) * N>;
  static constexpr int kWords = sizeof(T) * N / sizeof(Words);

  static __device__ Vector load(const T* from) {
    Words words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = reinterpret_cast<const Words*>(from)[i];
    }
    Vector vector;
    memcpy(&vector, words, sizeof vector);
    return vector;
  }

  __device__ void store(T* to) const {
    Words words[kWords];
    memcpy(words, this, sizeof words);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      __stwb(reinterpret_cast<Words*>(to) + i, words[i]);
    }
  }

  // Into shared memory, which __stwb is not for.
  __device__ void keep(T* to) const {
    Words words[kWords];
    memcpy(words, this, sizeof words);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<Words*>(to)[i] = words[i];
    }
  }
};

// Values of 16 bytes of the narrowest type that a kernel reads or writes.
template <typename Narrowest>
constexpr int kVector = 16 / sizeof(Narrowest);

// Whether every image of `size` elements in each of the arrays starts on a 16-byte boundary and is a whole number of
// vectors of N; a kernel that cannot have that goes one element at a time, still coalesced.
template <int N, typename... Pointers>
bool vectorises(int64_t size, const Pointers*... arrays) {
  return size % N == 0 && ((reinterpret_cast<uintptr_t>(arrays) % 16 == 0) && ...);
}

// x: blocks of kThreads over the `items` (elements or vectors) of an image; y: images, in strides of gridDim.y, which
// the hardware limits to 65535.
inline dim3 image_grid(int64_t batch, int64_t items) {
  return dim3(
      static_cast<unsigned>((items + kThreads - 1) / kThreads), static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
}

}  // namespace ctm_fast::cuda
