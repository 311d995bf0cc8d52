// A C++ program without Python that runs an op of libctm_fast_ops.so: for x = 3, F_x = 2 and t = sigma_data = 1, s = 0
// the denoiser is x / 2 + F_x / sqrt(2), which it prints.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdio>
#include <initializer_list>

using torch::stable::Tensor;

static Tensor full(std::initializer_list<int64_t> sizes, float value) {
  Tensor tensor = torch::stable::empty({sizes.begin(), sizes.size()}, torch::headeronly::ScalarType::Float);
  float* data = tensor.mutable_data_ptr<float>();
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    data[i] = value;
  }
  return tensor;
}

int main() {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{
      from(full({2, 3, 5, 7}, 3.0f)), from(full({2, 3, 5, 7}, 2.0f)), from(full({2}, 1.0f)), from(full({2}, 0.0f)),
      from(1.0)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("ctm_fast::precond_combine", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor G_x = torch::stable::detail::to<Tensor>(stack[0]);
  std::printf("%.6f\n", G_x.const_data_ptr<float>()[G_x.numel() - 1]);
}
