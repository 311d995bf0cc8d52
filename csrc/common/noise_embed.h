// The contract of noise_embed, checked for the CPU and the CUDA kernel.
#pragma once

#include <optional>

#include "check.h"

namespace ctm_fast {

inline void check_noise_embed(
    const char* op, const Tensor& t, const std::optional<Tensor>& s, const Tensor& freqs) {
  check_vector(op, "t", t, t);
  check_vector(op, "freqs", freqs, t);
  if (s) {
    check_levels(op, "s", *s, t);
  }
}

}  // namespace ctm_fast
