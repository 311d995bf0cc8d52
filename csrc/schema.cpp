// The schemas of every op, once: Python, C++ programs and AOTInductor packages all find them here.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ctm_fast, m) {
  m.def("precond_input(Tensor x, Tensor t, float sigma_data, ScalarType dtype) -> Tensor");
  m.def("precond_combine(Tensor x, Tensor F_x, Tensor t, Tensor s, float sigma_data) -> Tensor");
  m.def(
      "precond_combine_backward(Tensor grad, Tensor t, Tensor s, float sigma_data, ScalarType F_dtype, "
      "bool need_x, bool need_F) -> (Tensor, Tensor)");
  m.def("noise_embed(Tensor t, Tensor? s, Tensor freqs, float scale, bool sin_first) -> Tensor");
  m.def("philox_words(Tensor seeds, int step, int[] shape, int stream) -> Tensor");
  m.def("philox_normal(Tensor seeds, int step, int[] shape, int stream, bool channels_last) -> Tensor");
  m.def(
      "gamma_step(Tensor x, Tensor F_x, Tensor t, Tensor s, Tensor t_next, Tensor seeds, int step, "
      "float sigma_data) -> Tensor");
}
