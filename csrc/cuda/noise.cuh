// Which elements of an image a thread makes the noise of: one Philox block, four neighbours in the order (C, H, W).
#pragma once

#include "launch.cuh"

namespace ctm_fast::cuda {

// How an image lies in memory: as (C, H, W) and fit for 128-bit stores of float32, as (C, H, W), or as (H, W, C).
enum class Order { kVectors, kContiguous, kChannelsLast };

struct Image {
  int64_t channels;
  int64_t pixels;

  C10_HOST_DEVICE int64_t size() const { return channels * pixels; }
  C10_HOST_DEVICE int64_t blocks() const { return (size() + 3) / 4; }
};

struct Place {
  int64_t block;      // e >> 2
  int count;          // of its elements, how many there are: fewer than four only at the end of an image
  int64_t offset[4];  // and where
};

// In channels_last neighbouring threads take neighbouring channels of the same four pixels, if no block straddles two
// channels, and together write whole lines. Otherwise they take neighbouring blocks, and the cache gathers the lines.
template <Order order>
__device__ inline Place place(int64_t thread, Image image) {
  Place result;
  if (order == Order::kChannelsLast && image.pixels % 4 == 0) {
    const int64_t channel = thread % image.channels;
    const int64_t quad = thread / image.channels;
    result.block = channel * (image.pixels / 4) + quad;
    result.count = 4;
    for (int lane = 0; lane < 4; ++lane) {
      result.offset[lane] = (4 * quad + lane) * image.channels + channel;
    }
    return result;
  }
  result.block = thread;
  const int64_t left = image.size() - 4 * thread;
  result.count = left < 4 ? static_cast<int>(left) : 4;
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t element = 4 * thread + lane;
    result.offset[lane] = order == Order::kChannelsLast
        ? element % image.pixels * image.channels + element / image.pixels
        : element;
  }
  return result;
}

template <Order order, typename T>
__device__ inline void load(const T* image, const Place& at, float (&values)[4]) {
  if constexpr (order == Order::kVectors) {
    const auto vector = Vector<T, 4>::load(image + at.offset[0]);
    for (int lane = 0; lane < 4; ++lane) {
      values[lane] = static_cast<float>(vector.values[lane]);
    }
  } else {
    for (int lane = 0; lane < 4; ++lane) {
      values[lane] = lane < at.count ? static_cast<float>(image[at.offset[lane]]) : 0.0f;
    }
  }
}

template <Order order>
__device__ inline void store(float* image, const Place& at, const float (&values)[4]) {
  if constexpr (order == Order::kVectors) {
    Vector<float, 4> vector;
    for (int lane = 0; lane < 4; ++lane) {
      vector.values[lane] = values[lane];
    }
    vector.store(image + at.offset[0]);
  } else {
    for (int lane = 0; lane < 4; ++lane) {
      if (lane < at.count) {
        image[at.offset[lane]] = values[lane];
      }
    }
  }
}

}  // namespace ctm_fast::cuda
