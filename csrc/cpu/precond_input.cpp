// c_in(t) x on the CPU, from any of the three float dtypes to any: the op is its own gradient, with the dtypes exchanged.
#include <torch/csrc/stable/library.h>

#include "../common/levels.h"
#include "../common/precond_input.h"
#include "../common/tensor.h"
#include "images.h"
#include "widest.h"

namespace ctm_fast::cpu {
namespace {

template <typename In, typename Out>
CTM_FAST_WIDEST void scale(float factor, const In* __restrict__ x, Out* __restrict__ out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<Out>(factor * static_cast<float>(x[i]));
  }
}

Tensor precond_input(const Tensor& x, const Tensor& t, double sigma_data, ScalarType dtype) {
  constexpr const char* op = "precond_input";
  check_precond_input(op, x, t);

  Tensor out = empty_like(x, dtype);
  if (x.numel() == 0) {
    return out;
  }
  const int64_t batch = x.size(0);
  const float* t_data = t.const_data_ptr<float>();
  dispatch_floats(op, "x", x.scalar_type(), [&](auto in_type) {
    dispatch_floats(op, "dtype", dtype, [&](auto out_type) {
      using Out = decltype(out_type);
      const auto* x_data = x.const_data_ptr<decltype(in_type)>();
      Out* out_data = out.mutable_data_ptr<Out>();
      for_each_image(batch, x.numel() / batch, [=](int64_t image, int64_t begin, int64_t end) {
        const float factor = c_in(t_data[image], static_cast<float>(sigma_data));
        scale(factor, x_data + begin, out_data + begin, end - begin);
      });
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ctm_fast, CPU, m) {
  m.impl("precond_input", TORCH_BOX(&precond_input));
}

}  // namespace
}  // namespace ctm_fast::cpu
