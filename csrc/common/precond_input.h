// The contract of precond_input, checked for the CPU and the CUDA kernel.
#pragma once

#include "check.h"

namespace ctm_fast {

inline void check_precond_input(const char* op, const Tensor& x, const Tensor& t) {
  check_images(op, "x", x);
  check_levels(op, "t", t, x);
}

}  // namespace ctm_fast
