// G_x = a x + b F_x on the CPU, and its gradient (a grad, b grad); a and b follow from each image's levels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/levels.h"
#include "../common/precond_combine.h"
#include "../common/tensor.h"
#include "images.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

template <typename T>
CTM_FAST_WIDEST void combine(
    JumpWeights weights, const float* __restrict__ x, const T* __restrict__ F_x, float* __restrict__ out,
    int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = weights.x * x[i] + weights.F * static_cast<float>(F_x[i]);
  }
}

template <typename T>
CTM_FAST_WIDEST void scale(float factor, const float* __restrict__ grad, T* __restrict__ out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<T>(factor * grad[i]);
  }
}

Tensor precond_combine(const Tensor& x, const Tensor& F_x, const Tensor& t, const Tensor& s, double sigma_data) {
  constexpr const char* op = "precond_combine";
  check_precond_combine(op, x, F_x, t, s);

  Tensor out = empty_like(x, ScalarType::Float);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const float* x_data = x.const_data_ptr<float>();
  const float* t_data = t.const_data_ptr<float>();
  const float* s_data = s.const_data_ptr<float>();
  float* out_data = out.mutable_data_ptr<float>();
  dispatch_floats(op, "F_x", F_x.scalar_type(), [&](auto type) {
    const auto* F_data = F_x.const_data_ptr<decltype(type)>();
    for_each_image(batch, x.numel() / batch, [=](int64_t image, int64_t begin, int64_t end) {
      const JumpWeights weights = jump_weights(t_data[image], s_data[image], static_cast<float>(sigma_data));
      combine(weights, x_data + begin, F_data + begin, out_data + begin, end - begin);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> precond_combine_backward(
    const Tensor& grad, const Tensor& t, const Tensor& s, double sigma_data, ScalarType F_dtype, bool need_x,
    bool need_F) {
  constexpr const char* op = "precond_combine_backward";
  check_precond_combine_backward(op, grad, t, s);

  Tensor grad_x = need_x ? empty_like(grad, ScalarType::Float) : empty(grad, ScalarType::Float);
  Tensor grad_F = need_F ? empty_like(grad, F_dtype) : empty(grad, F_dtype);
  if (grad.numel() == 0) {
    return {grad_x, grad_F};
  }
  const int64_t batch = grad.size(0);
  const float* grad_data = grad.const_data_ptr<float>();
  const float* t_data = t.const_data_ptr<float>();
  const float* s_data = s.const_data_ptr<float>();
  float* grad_x_data = grad_x.mutable_data_ptr<float>();
  dispatch_floats(op, "F_dtype", F_dtype, [&](auto type) {
    using T = decltype(type);
    T* grad_F_data = grad_F.mutable_data_ptr<T>();
    for_each_image(batch, grad.numel() / batch, [=](int64_t image, int64_t begin, int64_t end) {
      const JumpWeights weights = jump_weights(t_data[image], s_data[image], static_cast<float>(sigma_data));
      if (need_x) {
        scale(weights.x, grad_data + begin, grad_x_data + begin, end - begin);
      }
      if (need_F) {
        scale(weights.F, grad_data + begin, grad_F_data + begin, end - begin);
      }
    });
  });
  return {grad_x, grad_F};
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("precond_combine", TORCH_BOX(&precond_combine));
  m.impl("precond_combine_backward", TORCH_BOX(&precond_combine_backward));
}

}  // namespace
}  // namespace ctm_fast::cpu
