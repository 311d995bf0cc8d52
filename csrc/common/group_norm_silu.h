// The contract of group_norm_silu, checked for the CPU and the CUDA kernels: what would corrupt memory if it were not so.
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"

namespace ctm_fast {

// Group normalisation's own arguments: images, affine [C], groups that divide the channels, shifts [B, C] or none.
inline void check_group_norm(
    const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
    const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  check_images(op, "x", x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(
      groups >= 1 && channels % groups == 0, op, ": groups: expected a divisor of ", channels, " channels, got ",
      groups);
  const auto check_numbers = [&](const char* name, const Tensor& numbers, IntHeaderOnlyArrayRef sizes) {
    check_dtype(op, name, numbers, ScalarType::Float);
    check_shape(op, name, numbers, sizes);
    check_device(op, name, numbers, x);
    check_contiguous(op, name, numbers);
  };
  check_numbers("weight", weight, {&channels, 1});
  check_numbers("bias", bias, {&channels, 1});
  const int64_t per_sample[] = {x.size(0), channels};
  if (x_shift) {
    check_numbers("x_shift", *x_shift, {per_sample, 2});
  }
  if (scale) {
    check_numbers("scale", *scale, {per_sample, 2});
  }
  if (shift) {
    check_numbers("shift", *shift, {per_sample, 2});
  }
}

inline void check_group_norm_silu(
    const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
    const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const std::optional<Tensor>& residual) {
  check_group_norm(op, x, weight, bias, groups, x_shift, scale, shift);
  if (residual) {
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_same_images(op, "residual", *residual, x);
  }
}

inline void check_group_norm_silu_backward(
    const char* op, const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, int64_t groups, const std::optional<Tensor>& x_shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift) {
  check_group_norm(op, x, weight, bias, groups, x_shift, scale, shift);
  check_dtype(op, "grad", grad, x.scalar_type());
  check_same_images(op, "grad", grad, x);
  const int64_t per_group[] = {x.size(0), groups};
  const auto check_statistic = [&](const char* name, const Tensor& statistic) {
    check_dtype(op, name, statistic, ScalarType::Float);
    check_shape(op, name, statistic, {per_group, 2});
    check_device(op, name, statistic, x);
    check_contiguous(op, name, statistic);
  };
  check_statistic("mean", mean);
  check_statistic("rstd", rstd);
}

}  // namespace ctm_fast
