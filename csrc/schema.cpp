// The schemas of every op, once: Python, C++ programs and AOTInductor packages all find them here. A step is a SymInt,
// so that torch.compile does not compile once more at each step of a sampler.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ctm_fast, m) {
  m.def("precond_input(Tensor x, Tensor t, float sigma_data, ScalarType dtype) -> Tensor");
  m.def("precond_combine(Tensor x, Tensor F_x, Tensor t, Tensor s, float sigma_data) -> Tensor");
  m.def(
      "precond_combine_backward(Tensor grad, Tensor t, Tensor s, float sigma_data, ScalarType F_dtype, "
      "bool need_x, bool need_F) -> (Tensor, Tensor)");
  m.def("noise_embed(Tensor t, Tensor? s, Tensor freqs, float scale, bool sin_first) -> Tensor");
  m.def("philox_words(Tensor seeds, SymInt step, SymInt[] shape, int stream) -> Tensor");
  m.def("philox_normal(Tensor seeds, SymInt step, SymInt[] shape, int stream, bool channels_last) -> Tensor");
  m.def(
      "gamma_step(Tensor x, Tensor F_x, Tensor t, Tensor s, Tensor t_next, Tensor seeds, SymInt step, "
      "int stream, float sigma_data) -> Tensor");
  m.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? x_shift, Tensor? scale, "
      "Tensor? shift, bool silu, Tensor? residual, float out_scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
      "int groups, Tensor? x_shift, Tensor? scale, Tensor? shift, bool silu, float out_scale, bool need_x) "
      "-> (Tensor, Tensor)");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("conv3x3_pack(Tensor weight) -> Tensor");
  m.def("conv3x3_packed(Tensor x, Tensor packed, Tensor? bias, int lanes) -> Tensor");
  m.def("conv3x3_weight_grad(Tensor grad, Tensor x, int lanes) -> Tensor");
}
