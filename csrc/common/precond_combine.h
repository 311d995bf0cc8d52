// The contract of precond_combine and its gradient, checked for the CPU and the CUDA kernels.
#pragma once

#include "check.h"

namespace ctm_fast {

inline void check_precond_combine(
    const char* op, const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s) {
  check_dtype(op, "x", x, ScalarType::Float);
  check_images(op, "x", x);
  check_same_images(op, "F_x", F_x, x);
  check_levels(op, "t", t, x);
  check_levels(op, "s", s, x);
}

inline void check_precond_combine_backward(const char* op, const Tensor& grad, const Tensor& t, const Tensor& s) {
  check_dtype(op, "grad", grad, ScalarType::Float);
  check_images(op, "grad", grad);
  check_levels(op, "t", t, grad);
  check_levels(op, "s", s, grad);
}

}  // namespace ctm_fast
