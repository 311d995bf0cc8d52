// What the stable headers of torch 2.10 leave out: an output like an input in another dtype, and dispatch on the dtype.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <optional>
#include <utility>

namespace ctm_fast {

// torch.empty_like(tensor, dtype=dtype): same shape, strides and device.
inline torch::stable::Tensor empty_like(
    const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(tensor),       from(std::optional(dtype)), from(std::nullopt),
      from(std::nullopt), from(std::nullopt),         from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

// tensor.new_empty(0, dtype=dtype): stands for a gradient that nobody asked for.
inline torch::stable::Tensor empty(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  const int64_t none = 0;
  return torch::stable::new_empty(tensor, {&none, 1}, dtype);
}

// Calls f(T{}) with the C++ type T of `dtype`: float, BFloat16 or Half.
template <typename F>
void dispatch_floats(const char* op, const char* name, torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(
          false, op, ": ", name, ": expected dtype Float, BFloat16 or Half, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace ctm_fast
