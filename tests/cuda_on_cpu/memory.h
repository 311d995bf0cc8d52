// The tensors that a launch can touch: every allocation made while the canaries are in place.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Allocation {
  char* data;
  size_t bytes;
};

std::vector<Allocation> live_allocations();

// What is wrong with the canaries around live allocations, in words; empty if nothing is. Repairs and counts it.
std::string check_canaries();

}  // namespace cuda_on_cpu
