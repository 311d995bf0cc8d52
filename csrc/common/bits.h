// A float's bits, and the float of given bits.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <cstring>

namespace ctm_fast {

C10_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

C10_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace ctm_fast
