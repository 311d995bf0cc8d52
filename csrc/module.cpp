// ctm_fast._C: how the libraries beside it were built. The kernels are not here but behind torch's dispatcher.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace py = pybind11;

static py::dict build_info() {
  const std::string cuda = CTM_FAST_CUDA;
  py::list architectures;
  std::istringstream names(cuda.empty() ? "" : CTM_FAST_CUDA_ARCHS);
  for (std::string name; names >> name;) {
    architectures.append(name);
  }
  py::dict info;
  info["compiler"] = CTM_FAST_COMPILER;
  info["flags"] = CTM_FAST_FLAGS;
  info["torch"] = CTM_FAST_TORCH;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["architectures"] = architectures;
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the libraries in ctm_fast/lib were built.";
  m.def(
      "build_info", &build_info,
      "compiler, flags, torch (the version compiled against), cuda (nvcc's version, or None), architectures (list).");
}
