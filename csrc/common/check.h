// Checks of what would corrupt memory, for callers that come past Python: each names op, argument, contract and value.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

namespace ctm_fast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string to_string(IntHeaderOnlyArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": ", name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, IntHeaderOnlyArrayRef sizes) {
  const auto got = tensor.sizes();
  bool same = got.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = got[i] == sizes[i];
  }
  STD_TORCH_CHECK(same, op, ": ", name, ": expected shape ", to_string(sizes), ", got ", to_string(got));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), op, ": ", name,
      ": expected the device of the other arguments, got ", tensor.is_cuda() ? "cuda:" : "cpu:",
      tensor.get_device_index());
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_contiguous(), op, ": ", name, ": expected a contiguous tensor, got strides ",
      to_string(tensor.strides()));
}

// One number for each image: float32 [B], contiguous, on the images' device.
inline void check_levels(const char* op, const char* name, const Tensor& levels, const Tensor& images) {
  const int64_t batch = images.size(0);
  check_dtype(op, name, levels, ScalarType::Float);
  check_shape(op, name, levels, {&batch, 1});
  check_device(op, name, levels, images);
  check_contiguous(op, name, levels);
}

// A list of numbers on its own: float32 with one axis, contiguous, on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& vector, const Tensor& like) {
  check_dtype(op, name, vector, ScalarType::Float);
  STD_TORCH_CHECK(vector.dim() == 1, op, ": ", name, ": expected one axis, got shape ", to_string(vector.sizes()));
  check_device(op, name, vector, like);
  check_contiguous(op, name, vector);
}

// [B, C, H, W] laid out densely as B, H, W, C.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) {
    return false;
  }
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) {
      return false;
    }
    expected *= tensor.size(dim);
  }
  return true;
}

// An image batch [B, C, H, W] whose images are dense, one after the other: contiguous or channels_last.
inline void check_images(const char* op, const char* name, const Tensor& images) {
  STD_TORCH_CHECK(
      images.dim() == 4, op, ": ", name, ": expected shape [B, C, H, W], got ", to_string(images.sizes()));
  STD_TORCH_CHECK(
      images.is_contiguous() || is_channels_last(images), op, ": ", name,
      ": expected a contiguous or channels_last tensor, got strides ", to_string(images.strides()));
}

// The same shape, device and order in memory as `like`, which passed check_images: element i is the same pixel in both.
inline void check_same_images(const char* op, const char* name, const Tensor& images, const Tensor& like) {
  check_shape(op, name, images, like.sizes());
  check_device(op, name, images, like);
  STD_TORCH_CHECK(
      (images.is_contiguous() && like.is_contiguous()) || (is_channels_last(images) && is_channels_last(like)), op,
      ": ", name, ": expected the memory format of the other images, strides ", to_string(like.strides()), ", got ",
      to_string(images.strides()));
}

}  // namespace ctm_fast
