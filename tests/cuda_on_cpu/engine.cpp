// Runs a launch on the CPU: a fiber for each thread of a block, one block after the other, twice: in order, and from the
// last block and thread to the first. Both orders are allowed to a GPU; what differs between them has no barrier.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_cpu {

constexpr size_t kSharedUnasked = 48 << 10;  // more only for a kernel that asked for it
constexpr size_t kSharedLimit = 99 << 10;    // two blocks fit a multiprocessor of sm_90, one that of sm_86
constexpr size_t kSharedCanary = 4096;

}  // namespace cuda_on_cpu

// The array that csrc/cuda/launch.cuh declares.
namespace ctm_fast_cuda_on_cpu::cuda {

alignas(16) __attribute__((section("cuda_shared"), used)) unsigned char
    dynamic_shared_memory[cuda_on_cpu::kSharedLimit + cuda_on_cpu::kSharedCanary];

}  // namespace ctm_fast_cuda_on_cpu::cuda

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kLimit = 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  char* stack = nullptr;
  bool started = false;
  State state = State::kReady;
  unsigned mask = 0;
  unsigned turn = 0;                  // which of the two slots the next exchange uses
  alignas(16) char slots[2][16] = {};
};

std::mutex mutex;
Fiber fibers[kLimit];
unsigned current = 0;
const std::function<void()>* body = nullptr;
jmp_buf scheduler;
std::string message;  // what was wrong with the last launch that failed
std::map<const void*, size_t> allowed;

// longjmp and not swapcontext, which makes two system calls at each switch.
void yield(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) {
    _longjmp(scheduler, 1);
  }
}

void enter() {
  for (;;) {
    (*body)();
    yield(State::kDone);
  }
}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
  if (_setjmp(scheduler) != 0) {
    return;
  }
  if (fiber.started) {
    _longjmp(fiber.resume, 1);
  }
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
      std::abort();
    }
    fiber.stack = static_cast<char*>(stack);
  }
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

void fail(const std::string& what) {
  message = message.empty() ? what : message;
}

// An access to no memory at all ends its thread, not the process.
void segmentation_fault(int) {
  fail("an access far outside every tensor");
  fibers[current].started = false;
  fibers[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

// While it lives, segmentation faults are reported so: on a stack of their own, as the fiber's may be the fault.
class Guard {
 public:
  Guard() {
    stack_t own{};
    own.ss_sp = stack_;
    own.ss_size = sizeof stack_;
    sigaltstack(&own, &old_stack_);
    struct sigaction action {};
    action.sa_handler = segmentation_fault;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_action_);
  }

  ~Guard() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  char stack_[64 << 10];
  stack_t old_stack_;
  struct sigaction old_action_;
};

// Whether every lane of the mask of a waiting thread waits with the same mask.
bool exchange_is_full(unsigned thread, unsigned count) {
  const unsigned first = thread / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp && first + lane < count; ++lane) {
    const Fiber& other = fibers[first + lane];
    if (fibers[thread].mask >> lane & 1 &&
        (other.state != State::kAtExchange || other.mask != fibers[thread].mask)) {
      return false;
    }
  }
  return true;
}

// Lets go whoever has no one left to wait for; false if nobody moves any more.
bool release(unsigned count) {
  std::vector<unsigned> free;
  unsigned at_barrier = 0;
  for (unsigned thread = 0; thread < count; ++thread) {
    at_barrier += fibers[thread].state == State::kAtBarrier;
    if (fibers[thread].state == State::kAtExchange && exchange_is_full(thread, count)) {
      free.push_back(thread);
    }
  }
  for (unsigned thread = 0; at_barrier == count && thread < count; ++thread) {
    free.push_back(thread);
  }
  for (const unsigned thread : free) {
    fibers[thread].state = State::kReady;
  }
  return !free.empty();
}

void run_block(unsigned count, bool reverse) {
  for (unsigned thread = 0; thread < count; ++thread) {
    fibers[thread].state = State::kReady;
  }
  for (;;) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned thread = reverse ? count - 1 - i : i;
      if (fibers[thread].state == State::kReady) {
        resume(thread);
      }
    }
    unsigned waiting[4] = {};
    for (unsigned thread = 0; thread < count; ++thread) {
      ++waiting[static_cast<int>(fibers[thread].state)];
    }
    if (waiting[static_cast<int>(State::kDone)] == count) {
      return;
    }
    if (!message.empty() || !release(count)) {
      fail(
          "of " + std::to_string(count) + " threads " + std::to_string(waiting[1]) + " wait at __syncthreads() and " +
          std::to_string(waiting[2]) + " at a warp's exchange, while " + std::to_string(waiting[3]) + " have returned");
      for (Fiber& fiber : fibers) {
        fiber.started = false;  // their stacks hold threads that never end
      }
      return;
    }
  }
}

void run_grid(const cudaLaunchConfig_t& config, bool reverse) {
  unsigned char* shared = ctm_fast_cuda_on_cpu::cuda::dynamic_shared_memory;
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks && message.empty(); ++i) {
    const uint64_t block = reverse ? blocks - 1 - i : i;
    blockIdx.x = static_cast<unsigned>(block % gridDim.x);
    blockIdx.y = static_cast<unsigned>(block / gridDim.x % gridDim.y);
    blockIdx.z = static_cast<unsigned>(block / gridDim.x / gridDim.y);
    std::fill_n(shared, config.dynamicSmemBytes + kSharedCanary, 0xff);
    run_block(blockDim.x * blockDim.y * blockDim.z, reverse);
    const auto end = shared + config.dynamicSmemBytes;
    if (std::any_of(end, end + kSharedCanary, [](unsigned char byte) { return byte != 0xff; })) {
      fail("wrote past its " + std::to_string(config.dynamicSmemBytes) + " bytes of shared memory");
    }
  }
}

using Contents = std::vector<std::vector<char>>;

Contents copy(const std::vector<Allocation>& live) {
  Contents contents;
  for (const Allocation& one : live) {
    contents.emplace_back(one.data, one.data + one.bytes);
  }
  return contents;
}

void run_twice(const cudaLaunchConfig_t& config) {
  const Guard guard;
  const std::vector<Allocation> live = live_allocations();
  const Contents before = copy(live);
  run_grid(config, false);
  const std::string wrong = check_canaries();
  if (!wrong.empty()) {
    fail(wrong);
  }
  if (!message.empty()) {
    return;
  }
  const Contents after = copy(live);
  for (size_t i = 0; i < live.size(); ++i) {
    std::copy(before[i].begin(), before[i].end(), live[i].data);
  }
  run_grid(config, true);
  if (message.empty() && copy(live) != after) {
    fail("the result depends on the order in which threads run: a barrier is missing, or two write to one place");
  }
}

}  // namespace

unsigned lane() {
  return current % kWarp;
}

void exchange(unsigned mask, const void* value, void* fetched, size_t bytes, unsigned from) {
  Fiber& fiber = fibers[current];
  const unsigned turn = fiber.turn;
  const unsigned source = current / kWarp * kWarp + from;
  fiber.turn ^= 1;
  fiber.mask = mask;
  std::memcpy(fiber.slots[turn], value, bytes);
  if (!(mask >> lane() & 1) || !(mask >> from & 1) || bytes > sizeof fiber.slots[0]) {
    fail("a lane's exchange with lane " + std::to_string(from) + ": a lane that its mask leaves out");
  }
  yield(State::kAtExchange);
  std::memcpy(fetched, fibers[source].slots[turn], bytes);
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedLimit) {
    message = "asked for " + std::to_string(bytes) + " bytes of shared memory";
    return cudaErrorInvalidValue;
  }
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  message.clear();
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const uint64_t threads = static_cast<uint64_t>(blockDim.x) * blockDim.y * blockDim.z;
  const auto asked = allowed.find(kernel);
  if (threads == 0 || threads > kLimit || blockDim.z > 64 || gridDim.x == 0 || gridDim.x > 0x7fffffff ||
      gridDim.y == 0 || gridDim.y > 65535 || gridDim.z == 0 || gridDim.z > 65535 ||
      config.dynamicSmemBytes > (asked == allowed.end() ? kSharedUnasked : asked->second)) {
    message = "invalid configuration: grid " + std::to_string(gridDim.x) + " x " + std::to_string(gridDim.y) + " x " +
        std::to_string(gridDim.z) + ", " + std::to_string(threads) + " threads, " +
        std::to_string(config.dynamicSmemBytes) + " bytes of shared memory";
    return cudaErrorInvalidConfiguration;
  }
  body = &thread;
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].turn = 0;
  }
  run_twice(config);
  return message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

void __syncthreads() {
  cuda_on_cpu::yield(cuda_on_cpu::State::kAtBarrier);
}

// What torch has only where it is built with CUDA, and a guard that it refuses without a GPU.
extern "C" {

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) {
  return 0;
}

int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** text) {
  if (error != 0) {
    *text = strdup(("CUDA on a CPU: " + cuda_on_cpu::message).c_str());
  }
  return 0;
}

void torch_c10_cuda_free_error_msg(char* text) {
  std::free(text);
}

// The kernels are compiled with -fsanitize=alignment,bounds: these are what the compiler calls where it finds a fault.
struct Source {
  const char* file;
  uint32_t line;
  uint32_t column;
};

static void undefined(const char* what, const Source& at) {
  cuda_on_cpu::fail(std::string(what) + " at " + at.file + ":" + std::to_string(at.line));
}

void __ubsan_handle_type_mismatch_v1(Source* at, void*) {
  undefined("a pointer that is not aligned for the access", *at);
}

void __ubsan_handle_out_of_bounds(Source* at, void*) {
  undefined("an index beyond its array", *at);
}
}
