// An allocator for torch's CPU tensors that poisons what surrounds each: 4 KiB of 0xFF, which is NaN in float32,
// bfloat16 and float16, before and right after it, and in it until it is written. What reads past an end computes NaN;
// what writes past one is found when the tensor is freed, and after each launch.
#include "memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace cuda_on_cpu {
namespace {

constexpr size_t kCanary = 4096;
constexpr size_t kAlignment = 64;
constexpr unsigned char kPoison = 0xff;

std::mutex mutex;
std::map<char*, size_t> allocations;
int64_t violations = 0;

std::string check(const Allocation& allocation) {
  std::string wrong;
  for (const bool after : {false, true}) {
    char* canary = after ? allocation.data + allocation.bytes : allocation.data - kCanary;
    const auto spoilt = [](char byte) { return static_cast<unsigned char>(byte) != kPoison; };
    const auto first = std::find_if(canary, canary + kCanary, spoilt);
    if (first != canary + kCanary) {
      wrong = "wrote at byte " + std::to_string(first - allocation.data) + " of a tensor of " +
          std::to_string(allocation.bytes) + " bytes";
      std::memset(canary, kPoison, kCanary);
      ++violations;
    }
  }
  return wrong;
}

void release(void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(static_cast<char*>(pointer));
  check({found->first, found->second});
  std::free(found->first - kCanary);
  allocations.erase(found);
}

class Canaries final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    }
    const size_t total = (2 * kCanary + bytes + kAlignment - 1) / kAlignment * kAlignment;
    char* start = static_cast<char*>(std::aligned_alloc(kAlignment, total));
    TORCH_CHECK(start != nullptr, "no memory for ", total, " bytes");
    std::memset(start, kPoison, total);
    const std::lock_guard<std::mutex> lock(mutex);
    allocations.emplace(start + kCanary, bytes);
    return {start + kCanary, start + kCanary, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Canaries canaries;
c10::Allocator* previous = nullptr;

}  // namespace

std::vector<Allocation> live_allocations() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<Allocation> live;
  for (const auto& [data, bytes] : allocations) {
    live.push_back({data, bytes});
  }
  return live;
}

std::string check_canaries() {
  const std::lock_guard<std::mutex> lock(mutex);
  std::string wrong;
  for (const auto& [data, bytes] : allocations) {
    const std::string one = check({data, bytes});
    wrong = one.empty() ? wrong : one;
  }
  return wrong;
}

}  // namespace cuda_on_cpu

// For ctypes.
extern "C" {

// New CPU tensors have canaries from here on, until remove_canaries().
__attribute__((visibility("default"))) void install_canaries() {
  cuda_on_cpu::previous = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&cuda_on_cpu::canaries);
}

__attribute__((visibility("default"))) void remove_canaries() {
  c10::SetCPUAllocator(cuda_on_cpu::previous);
}

// Canaries that were found overwritten since the last call, those of live tensors included.
__attribute__((visibility("default"))) int64_t count_violations() {
  cuda_on_cpu::check_canaries();
  return std::exchange(cuda_on_cpu::violations, 0);
}
}
