// A C++ program without Python: runs the AOTInductor package argv[1] on inputs that it makes itself and writes the
// result, float32, to argv[2].
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>

int main(int, char** argv) {
  const c10::InferenceMode no_gradients;
  const at::Tensor x = torch::linspace(-3, 3, 2 * 3 * 8 * 8).reshape({2, 3, 8, 8});
  const at::Tensor t = torch::tensor({0.5f, 40.0f});
  const at::Tensor s = torch::tensor({0.002f, 40.0f});

  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const at::Tensor G_x = package.run({x, t, s}).at(0).contiguous();

  std::ofstream(argv[2], std::ios::binary).write(static_cast<const char*>(G_x.const_data_ptr()), G_x.nbytes());
}
