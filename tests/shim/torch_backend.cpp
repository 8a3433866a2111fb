// The operators on the shim: csrc/cuda/dispatch.cpp, as it is, over tensors on the CPU.
//
// include/ stands in for the headers of torch's CUDA runtime. What dispatch.cpp registers for CUDA tensors is
// registered here for CPU tensors instead, while `shim_use` says so; the CPU's own kernels come back
// afterwards. tests/shim_build.py loads this library and calls the functions at its end.
#include <torch/library.h>

#include <memory>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) void register_dispatch(torch::Library& m)

#include "cuda/dispatch.cpp"
#include "shim.h"

#define SHIM_API extern "C" __attribute__((visibility("default")))

SHIM_API void shim_use(bool use) {
  static std::unique_ptr<torch::Library> registered;
  registered.reset();
  if (!use) return;
  registered = std::make_unique<torch::Library>(torch::Library::IMPL, "vaekernels", c10::DispatchKey::CPU,
                                                __FILE__, __LINE__);
  vk::register_dispatch(*registered);
}

SHIM_API void shim_seed(uint64_t seed) { shim::settings().seed = seed; }

SHIM_API int64_t shim_launches() { return shim::launches(); }

// Whether the stream captures a graph.
SHIM_API void shim_capture(bool capture) {
  c10::cuda::getCurrentCUDAStream().stream()->capture =
      capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

// The kernels' counters that are not zero, which they should be after every call.
SHIM_API int64_t shim_dirty_counters() {
  const unsigned* counters = vk::counters_for(c10::cuda::getCurrentCUDAStream());
  int64_t dirty = 0;
  for (size_t i = 0; i < vk::cuda::kCounters; ++i) dirty += counters[i] != 0 ? 1 : 0;
  return dirty;
}
