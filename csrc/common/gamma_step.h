// The contract of gamma_step, checked for the CPU and the CUDA kernel.
#pragma once

#include "check.h"
#include "noise.h"
#include "precond_combine.h"

namespace ctm_fast {

inline void check_gamma_step(
    const char* op, const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s, const Tensor& t_next,
    const Tensor& seeds) {
  check_precond_combine(op, x, F_x, t, s);
  check_levels(op, "t_next", t_next, x);
  check_seeds(op, seeds, x);
}

}  // namespace ctm_fast
