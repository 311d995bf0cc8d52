// Two faults to be found, so that a sanitizer which finds none is known not to work here: an access beyond the end of
// an array ("memcheck"), two warps that write to the same shared memory ("racecheck"). With no argument, neither.
#include <cstdio>
#include <cstring>

__global__ void overrun(int* out, int size) { out[size + threadIdx.x] = 1; }

__global__ void race(int* out) {
  __shared__ int last;
  last = threadIdx.x / 32;
  out[threadIdx.x] = last;
}

int main(int count, char** words) {
  int* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) {
    std::puts("no memory on the GPU");
    return 1;
  }
  if (count > 1 && std::strcmp(words[1], "memcheck") == 0) {
    overrun<<<1, 64>>>(out, 64);
  } else if (count > 1 && std::strcmp(words[1], "racecheck") == 0) {
    race<<<1, 64>>>(out);
  }
  const cudaError_t error = cudaDeviceSynchronize();
  std::puts(cudaGetErrorString(error));
  return error == cudaSuccess ? 0 : 1;
}
