// How the threads of a block divide an image whose channels have a number each, and how they add up over its pixels.
#pragma once

#include "launch.cuh"

namespace ctm_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;

// An image in chunks of `chunk` pixels. In channels_last `columns` threads side by side take the vectors of a pixel, and
// a block as many pixels at once as it has rows of them; otherwise `columns` lanes, a power of two up to a warp, take one
// channel. Neither depends on the batch, so that a sample's result does not.
struct Plan {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t chunk;
  int64_t chunks;
  int64_t blocks;  // of one image
  int columns;

  C10_HOST_DEVICE int64_t size() const { return channels * pixels; }
};

// Vectors that a thread has in flight at once.
constexpr int kInFlight = 4;

template <int N>
Plan make_plan(int64_t batch, int64_t channels, int64_t pixels, bool channels_last) {
  Plan plan{batch, channels, pixels, 1, 0, 0, 1};
  const int64_t vectors = channels_last ? channels / N : pixels / N;
  if (channels_last) {
    plan.columns = static_cast<int>(std::min<int64_t>(vectors, kWarp));
  } else {
    while (plan.columns < kWarp && plan.columns < vectors) {
      plan.columns *= 2;
    }
  }
  // Large images in about eight chunks, so that their partial sums are few; none shorter than what is in flight.
  const int64_t pass = kInFlight * (channels_last ? kThreads / plan.columns : plan.columns * N);
  plan.chunk = pass * std::clamp<int64_t>(pixels / (8 * pass), 1, 4);
  plan.chunks = (pixels + plan.chunk - 1) / plan.chunk;
  const int64_t shares = kThreads / plan.columns;
  plan.blocks = channels_last ? plan.chunks * ((vectors + plan.columns - 1) / plan.columns)
                              : (channels * plan.chunks + shares - 1) / shares;
  return plan;
}

// What a thread handles: `count` vectors of N elements at offsets first, first + step, ... of an image, all of the same
// channels: N of them in channels_last, one otherwise.
template <int N, bool kLast>
struct Share {
  int64_t image;
  int64_t chunk;
  int64_t channel;
  int64_t first;
  int64_t step;
  int count;
  int row;   // channels_last: which of the block's rows of threads
  int lane;  // otherwise: which of the lanes of this channel
  bool present;

  static constexpr int kChannels = kLast ? N : 1;

  __device__ explicit Share(const Plan& plan) {
    image = blockIdx.x / plan.blocks;
    const int64_t block = blockIdx.x % plan.blocks;
    const int column = threadIdx.x % plan.columns;
    const int rows = kThreads / plan.columns;
    row = threadIdx.x / plan.columns;
    lane = column;
    int64_t pixel;
    int64_t pixel_step;
    if constexpr (kLast) {
      const int64_t across = plan.blocks / plan.chunks;
      chunk = block / across;
      channel = (block % across * plan.columns + column) * N;
      present = row < rows && channel < plan.channels;
      pixel = chunk * plan.chunk + row;
      pixel_step = rows;
      first = pixel * plan.channels + channel;
      step = rows * plan.channels;
    } else {
      const int64_t share = block * rows + row;
      chunk = share % plan.chunks;
      channel = share / plan.chunks;
      present = channel < plan.channels;
      pixel = chunk * plan.chunk + column * N;
      pixel_step = plan.columns * N;
      first = channel * plan.pixels + pixel;
      step = pixel_step;
    }
    const int64_t end = chunk * plan.chunk + plan.chunk < plan.pixels ? chunk * plan.chunk + plan.chunk : plan.pixels;
    count = present && pixel < end ? static_cast<int>((end - pixel + pixel_step - 1) / pixel_step) : 0;
  }

  // Whether this thread stores what the block, or the lanes of its channel, added up.
  __device__ bool stores() const { return present && (kLast ? row : lane) == 0; }
};

// Adds up over the threads with the same channels, always in the same order, into those that store: values[q][i] is
// number q of channel i, and combine(a, b) takes the K numbers b of a channel into a. Shared memory: K kThreads N floats
// in channels_last, none otherwise.
template <int N, bool kLast, int K, typename Combine>
__device__ void reduce(
    const Share<N, kLast>& share, int columns, float (&values)[K][kLast ? N : 1], const Combine& combine) {
  constexpr int M = kLast ? N : 1;
  float mine[K];
  float other[K];
  if constexpr (kLast) {
    const int rows = kThreads / columns;
    const int width = columns * N;
    float* shared = shared_memory<float>();
    float* own = shared + share.row * width + threadIdx.x % columns * N;
    const int plane = rows * width;
    int half = 1;
    while (half < rows) {
      half *= 2;
    }
    bool stored = false;
    for (half /= 2; half > 0; half /= 2) {
      if (share.row >= half && share.row < rows && !stored) {
        stored = true;
#pragma unroll
        for (int q = 0; q < K; ++q) {
#pragma unroll
          for (int i = 0; i < M; ++i) {
            own[q * plane + i] = values[q][i];
          }
        }
      }
      __syncthreads();
      if (share.row < half && share.row + half < rows) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
          for (int q = 0; q < K; ++q) {
            mine[q] = values[q][i];
            other[q] = own[q * plane + half * width + i];
          }
          combine(mine, other);
#pragma unroll
          for (int q = 0; q < K; ++q) {
            values[q][i] = mine[q];
          }
        }
      }
    }
  } else {
    for (int distance = columns / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int q = 0; q < K; ++q) {
        mine[q] = values[q][0];
        other[q] = __shfl_xor_sync(kWholeWarp, mine[q], distance);
      }
      combine(mine, other);
#pragma unroll
      for (int q = 0; q < K; ++q) {
        values[q][0] = mine[q];
      }
    }
  }
}

// Bytes of shared memory that reduce() of K numbers wants.
template <int N, bool kLast, int K>
constexpr size_t kReduceBytes = kLast ? sizeof(float) * K * kThreads * N : 0;

// Of `count` numbers: their mean, and the sum of squares of what differs from it.
struct Moments {
  float count;
  float mean;
  float squares;
};

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
__device__ inline Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  const float share = count > 0 ? b.count / count : 0.0f;
  const float delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

}  // namespace ctm_fast::cuda
