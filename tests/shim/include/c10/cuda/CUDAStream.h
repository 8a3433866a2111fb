// torch's current stream, for the shim (see ../../../shim.h): one, which runs launches at once.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                                  \
  do {                                                                                        \
    const cudaError_t error = (call);                                                         \
    TORCH_CHECK(error == cudaSuccess, "CUDA error in the shim: ", cudaGetErrorString(error)); \
  } while (false)

namespace c10::cuda {

class CUDAStream {
 public:
  explicit CUDAStream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream() const { return stream_; }
  operator cudaStream_t() const { return stream_; }
  DeviceIndex device_index() const { return 0; }

 private:
  cudaStream_t stream_;
};

inline CUDAStream getCurrentCUDAStream() {
  static CUstream_st stream;
  return CUDAStream(&stream);
}

}  // namespace c10::cuda
