// The CUDA backend of the operators: device, stream, generator, scratch memory, and nothing else.
#include <ATen/core/Generator.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "../aggregate_launch.h"
#include "aggregate.h"
#include "latent.h"

namespace vk {
namespace {

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// The state of the next call. Under its lock, since a generator is shared between threads.
at::PhiloxCudaState next_state(const std::optional<at::Generator>& generator) {
  auto* gen = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(gen->mutex_);
  return gen->philox_cuda_state(4);
}

at::Tensor empty_state(const at::Tensor& like) { return at::empty({2}, like.options().dtype(at::kLong)); }

void write_state(const at::PhiloxCudaState& state, at::Tensor& out, cudaStream_t stream) {
  cuda::StateSource source;
  if (state.captured_) {
    source.seed_data = state.seed_.ptr;
    source.offset_data = state.offset_.ptr;
    source.step = state.offset_intragraph_;
  } else {
    source.seed = state.seed_.val;
    source.offset = state.offset_.val;
  }
  C10_CUDA_CHECK(cuda::write_state(source, out.mutable_data_ptr<int64_t>(), stream));
}

// Counters for the stream: zero before and after every call, because calls on one stream follow each other. A
// capture never uses them, so an abandoned one leaves no counter that is not zero. 16 KiB, taken at the first
// call on a stream and never freed; a later stream of the same handle finds them zero. Not from torch's
// allocator: its memory may belong to a graph's pool or to a user's, which nothing may outlive. Null where
// there is no memory: then the sums are finished as in a capture.
unsigned* counters_for(c10::cuda::CUDAStream stream) {
  static std::mutex mutex;
  static auto* made =
      new std::map<std::pair<c10::DeviceIndex, cudaStream_t>, unsigned*>();  // outlives CUDA's teardown
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned*& counters = (*made)[{stream.device_index(), stream.stream()}];
  if (counters != nullptr) return counters;
  // An allocation would break a capture that another thread has begun in the mode that forbids it.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  constexpr size_t kBytes = cuda::kCounters * sizeof(unsigned);
  void* memory = nullptr;
  cudaError_t result = cudaMalloc(&memory, kBytes);
  if (result == cudaSuccess) result = cudaMemsetAsync(memory, 0, kBytes, stream.stream());
  C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  if (result == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // or the next check would find it
    return nullptr;
  }
  C10_CUDA_CHECK(result);
  counters = static_cast<unsigned*>(memory);
  return counters;
}

struct CudaBackend {
  static at::Tensor rng_state(const at::Tensor& like, const std::optional<at::Generator>& generator) {
    const c10::DeviceGuard guard(like.device());
    at::Tensor out = empty_state(like);
    write_state(next_state(generator), out, c10::cuda::getCurrentCUDAStream());
    return out;
  }

  static at::Tensor draw(Forward& call, const at::Tensor& like,
                         const std::optional<at::Generator>& generator) {
    const c10::DeviceGuard guard(like.device());
    at::Tensor out = empty_state(like);
    const at::PhiloxCudaState state = next_state(generator);
    call.rng_out = out.mutable_data_ptr<int64_t>();
    if (state.captured_) {  // the numbers are known only when the graph runs
      call.rng = state.seed_.ptr;
      call.rng_offset = state.offset_.ptr;
      call.offset = state.offset_intragraph_;
    } else {
      call.host_state = true;
      call.seed = state.seed_.val;
      call.offset = state.offset_.val;
    }
    return out;
  }

  static void forward(const Forward& call, const at::Tensor& like) {
    const c10::DeviceGuard guard(like.device());
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const bool captured = capturing(stream);
    const size_t bytes = cuda::forward_scratch(call);
    // From the caching allocator: later work on this stream may reuse the block, and comes after the kernel.
    at::Tensor scratch;
    if (bytes > 0) scratch = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
    // Without scratch memory one block does all the work, and counts nothing.
    unsigned* counters = captured || bytes == 0 ? nullptr : counters_for(stream);
    C10_CUDA_CHECK(cuda::forward(call, bytes > 0 ? scratch.mutable_data_ptr() : nullptr, counters,
                                 counters == nullptr, stream));
  }

  static void backward(const Backward& call, const at::Tensor& like) {
    const c10::DeviceGuard guard(like.device());
    C10_CUDA_CHECK(cuda::backward(call, c10::cuda::getCurrentCUDAStream()));
  }

  template <class Call>
  static void aggregate(const Call& call, const at::Tensor& like) {
    const c10::DeviceGuard guard(like.device());
    const size_t bytes = cuda::aggregate_scratch(call);
    at::Tensor scratch;
    if (bytes > 0) scratch = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
    C10_CUDA_CHECK(cuda::aggregate(call, bytes > 0 ? scratch.mutable_data_ptr() : nullptr,
                                   c10::cuda::getCurrentCUDAStream()));
  }

  static at::Tensor philox_words(const at::Tensor& rng, int64_t n, int64_t first_quad) {
    const c10::DeviceGuard guard(rng.device());
    at::Tensor words = at::empty({n}, rng.options());
    C10_CUDA_CHECK(cuda::philox_words(rng.const_data_ptr<int64_t>(), static_cast<uint64_t>(first_quad), n,
                                      words.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
    return words;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(vaekernels, CUDA, m) {
  register_kernels<Operators<CudaBackend>, CudaBackend>(m);
  register_aggregate<AggregateOperators<CudaBackend>>(m);
}

}  // namespace vk
