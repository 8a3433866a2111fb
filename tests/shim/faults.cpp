// Small kernels, each right and with one fault planted. `faults NAME right|wrong` runs one under several
// schedules; it prints what was found wrong and exits with 1, or prints "ok" and exits with 0. The sanitizers
// end the program themselves.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

// What the kernels under test use.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "guarded.h"

namespace {

using shim::Guarded;

constexpr int kThreads = 96, kBlocks = 11;

// One int for each thread, the input; the output lies in `out`, as large, or is one number.
struct Data {
  Guarded in{kBlocks * kThreads * sizeof(int)};
  Guarded out{kBlocks * kThreads * sizeof(int), 0xCD};
  Guarded counters{2 * sizeof(unsigned)};

  int* input() const { return reinterpret_cast<int*>(in.data()); }
  int* output() const { return reinterpret_cast<int*>(out.data()); }
  unsigned* counter(int i) const { return reinterpret_cast<unsigned*>(counters.data()) + i; }
};

// ---- the kernels: `Wrong` plants the fault ---------------------------------------------------------------

// Each thread reads what another one wrote to shared memory.
template <bool Wrong>
__global__ void reverse(const int* in, int* out) {
  VK_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  const int first = blockIdx.x * blockDim.x, i = threadIdx.x;
  shared[i] = in[first + i];
  if (!Wrong) __syncthreads();
  out[first + i] = shared[blockDim.x - 1 - i];
}

// The sum of everything: each block leaves its share, the last to arrive adds them.
template <bool Wrong>
__device__ bool last_to_arrive(unsigned* counter, unsigned count) {
  if (!Wrong) return vk::cuda::arrive_last(counter, count);
  unsigned before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &before, before >= count - 1 ? 0 : before + 1, false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before == count - 1;
}

template <bool Wrong>
__global__ void sum_of_blocks(const int* in, int* shares, int* sum, unsigned* counter) {
  VK_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  int* flag = shared + blockDim.x;
  const int share = vk::cuda::block_sum(shared, in[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) shares[blockIdx.x] = share;
  __syncthreads();
  if (threadIdx.x == 0) *flag = last_to_arrive<Wrong>(counter, gridDim.x) ? 1 : 0;
  __syncthreads();
  if (*flag == 0) return;
  // Another thread than the one that wrote it, so that only the counter orders the two.
  const unsigned other = threadIdx.x - 1;
  const int total = vk::cuda::block_sum(shared, other < gridDim.x ? shares[other] : 0);
  if (threadIdx.x == 0) *sum = total;
}

// Sums of neighbours by shuffle; a lane that stays away leaves the others waiting.
template <bool Wrong>
__global__ void warp_sums(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int sum = in[i];
  if (!Wrong || threadIdx.x != 37) sum = vk::cuda::lane_sum(sum, 32);
  __syncthreads();
  out[i] = sum;
}

// The same by a lane that has returned.
template <bool Wrong>
__global__ void warp_sums_after_return(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Wrong && threadIdx.x == 37) return;
  out[i] = vk::cuda::lane_sum(in[i], 32);
}

// A lane that gives another mask than its neighbours.
template <bool Wrong>
__global__ void warp_sums_by_mask(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned mask = Wrong && threadIdx.x == 37 ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  out[i] = in[i] + __shfl_xor_sync(mask, in[i], 1);
}

// Writes (or reads) shared memory up to its last byte.
template <bool Read>
__global__ void fill_shared(const int* in, int* out) {
  VK_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x, last = static_cast<int>(blockDim.x) - 1;
  if (!Read || threadIdx.x == 0) shared[threadIdx.x] = in[i];
  __syncthreads();
  // The compiler must not see that reading gives nothing.
  const int seen = Read ? *static_cast<volatile int*>(shared + last) : shared[threadIdx.x];
  out[i] = Read ? in[i] + (seen & 0) : seen;
}

// Copies n numbers, or n + 1.
template <bool Wrong>
__global__ void copy_numbers(const int* in, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i];
  if (Wrong && i == n - 1) out[n] = in[i];
}

// Reads one number too far and does nothing with it.
template <bool Wrong>
__global__ void peek_at_numbers(const int* in, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = in[i] + (static_cast<const volatile int*>(in)[Wrong ? i + 1 : i] & 0);
}

// Half the block takes another barrier than the rest, or none.
template <bool Wrong>
__global__ void diverged(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Wrong && threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
  out[i] = in[i];
}

template <>
void diverged<false>(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  out[i] = in[i];
}

template <bool Wrong>
__global__ void returns_early(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
  if (Wrong && threadIdx.x == 5) return;
  __syncthreads();
}

// Every block writes a number of its own, or all the same.
template <bool Wrong>
__global__ void block_numbers(int* out) {
  if (threadIdx.x == 0) out[Wrong ? 0 : blockIdx.x] = Wrong ? 1 : static_cast<int>(blockIdx.x);
}

// Vectors of four, the first of them at a multiple of 16 bytes, or not.
__global__ void copy_vectors(const int* in, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const uint4 four = __ldg(reinterpret_cast<const uint4*>(in) + i);
  out[4 * i] = static_cast<int>(four.x);
  out[4 * i + 1] = static_cast<int>(four.y);
  out[4 * i + 2] = static_cast<int>(four.z);
  out[4 * i + 3] = static_cast<int>(four.w);
}

// ---- running and judging ---------------------------------------------------------------------------------

using Run = void (*)(Data&);

void launch_reverse(Data& d, void (*kernel)(const int*, int*), size_t shared) {
  VK_LAUNCH(kernel, dim3(kBlocks), kThreads, shared, nullptr, d.input(), d.output());
}

template <bool Wrong>
void run_sum(Data& d) {
  VK_LAUNCH(sum_of_blocks<Wrong>, dim3(kBlocks), 32, 33 * sizeof(int), nullptr, d.input(), d.output() + 1,
            d.output(), d.counter(0));
}

template <bool Wrong>
void run_copy(Data& d) {
  const int n = kBlocks * kThreads;
  VK_LAUNCH(copy_numbers<Wrong>, dim3(kBlocks), kThreads, 0, nullptr, d.input(), d.output(), n);
}

template <bool Wrong>
void run_peek(Data& d) {
  const int n = kBlocks * kThreads;
  VK_LAUNCH(peek_at_numbers<Wrong>, dim3(kBlocks), kThreads, 0, nullptr, d.input(), d.output(), n);
}

int reversed(int i) { return i / kThreads * kThreads + kThreads - 1 - i % kThreads; }

struct Fault {
  const char* name;
  Run right, wrong;
  // The number that thread i has to leave, from the input in[i] = i * i; for i below `count`.
  int (*expected)(int i);
  int count;
};

int square(int i) { return i * i; }
int sum_of_squares(int) {
  int sum = 0;
  for (int i = 0; i < kBlocks * 32; ++i) sum += i * i;
  return sum;
}
int warp_sum(int i) {
  int sum = 0;
  for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) sum += j * j;
  return sum;
}

const Fault kFaults[] = {
    {"barrier", [](Data& d) { launch_reverse(d, reverse<false>, kThreads * sizeof(int)); },
     [](Data& d) { launch_reverse(d, reverse<true>, kThreads * sizeof(int)); },
     [](int i) { return square(reversed(i)); }, kBlocks * kThreads},
    {"fence", run_sum<false>, run_sum<true>, sum_of_squares, 1},
    {"skipped_shuffle", [](Data& d) { launch_reverse(d, warp_sums<false>, 0); },
     [](Data& d) { launch_reverse(d, warp_sums<true>, 0); }, warp_sum, kBlocks * kThreads},
    {"returned_lane", [](Data& d) { launch_reverse(d, warp_sums_after_return<false>, 0); },
     [](Data& d) { launch_reverse(d, warp_sums_after_return<true>, 0); }, warp_sum, kBlocks * kThreads},
    {"other_mask", [](Data& d) { launch_reverse(d, warp_sums_by_mask<false>, 0); },
     [](Data& d) { launch_reverse(d, warp_sums_by_mask<true>, 0); },
     [](int i) { return square(i) + square(i ^ 1); }, kBlocks * kThreads},
    {"short_shared", [](Data& d) { launch_reverse(d, fill_shared<false>, kThreads * sizeof(int)); },
     [](Data& d) { launch_reverse(d, fill_shared<false>, kThreads * sizeof(int) - 4); }, square,
     kBlocks * kThreads},
    {"short_shared_read", [](Data& d) { launch_reverse(d, fill_shared<true>, kThreads * sizeof(int)); },
     [](Data& d) { launch_reverse(d, fill_shared<true>, kThreads * sizeof(int) - 4); }, square,
     kBlocks * kThreads},
    {"past_the_end", run_copy<false>, run_copy<true>, square, kBlocks * kThreads},
    {"past_the_end_read", run_peek<false>, run_peek<true>, square, kBlocks * kThreads},
    {"stale_counter", run_sum<false>,
     [](Data& d) {
       *d.counter(0) = 1;
       run_sum<false>(d);
     },
     sum_of_squares, 1},
    {"diverged", [](Data& d) { launch_reverse(d, diverged<false>, 0); },
     [](Data& d) { launch_reverse(d, diverged<true>, 0); }, square, kBlocks * kThreads},
    {"early_return", [](Data& d) { launch_reverse(d, returns_early<false>, 0); },
     [](Data& d) { launch_reverse(d, returns_early<true>, 0); }, square, kBlocks * kThreads},
    {"blocks_race",
     [](Data& d) { VK_LAUNCH(block_numbers<false>, dim3(kBlocks), kThreads, 0, nullptr, d.output()); },
     [](Data& d) { VK_LAUNCH(block_numbers<true>, dim3(kBlocks), kThreads, 0, nullptr, d.output()); },
     nullptr, 0},
    {"misaligned_vector",
     [](Data& d) { VK_LAUNCH(copy_vectors, dim3(1), 32, 0, nullptr, d.input(), d.output()); },
     [](Data& d) { VK_LAUNCH(copy_vectors, dim3(1), 32, 0, nullptr, d.input() + 1, d.output()); }, nullptr,
     0},
    {"too_many_threads",
     [](Data& d) { VK_LAUNCH(block_numbers<false>, dim3(1), 1024, 0, nullptr, d.output()); },
     [](Data& d) { VK_LAUNCH(block_numbers<false>, dim3(1), 1025, 0, nullptr, d.output()); }, nullptr, 0},
    {"too_much_shared", [](Data& d) { launch_reverse(d, fill_shared<false>, 48 * 1024); },
     [](Data& d) { launch_reverse(d, fill_shared<false>, 48 * 1024 + 1); }, square, kBlocks * kThreads},
};

// What is wrong after a run; empty if nothing is.
std::string judge(const Fault& fault, Run run) {
  Data d;
  for (int i = 0; i < kBlocks * kThreads; ++i) d.input()[i] = i * i;
  run(d);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    return std::string("the launch failed: ") + cudaGetErrorString(error);
  if (!d.in.whole() || !d.out.whole() || !d.counters.whole()) return "bytes beside a tensor were written";
  for (int i = 0; i < 2; ++i)
    if (*d.counter(i) != 0) return "a counter is left at " + std::to_string(*d.counter(i));
  for (int i = 0; i < fault.count; ++i)
    if (d.output()[i] != fault.expected(i))
      return "number " + std::to_string(i) + " is " + std::to_string(d.output()[i]) + ", expected " +
             std::to_string(fault.expected(i));
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  for (const Fault& fault : kFaults) {
    if (argc == 1) std::printf("%s\n", fault.name);
    if (argc != 3 || std::strcmp(argv[1], fault.name) != 0) continue;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      shim::settings().seed = seed;
      std::string found;
      try {
        found = judge(fault, std::strcmp(argv[2], "wrong") == 0 ? fault.wrong : fault.right);
      } catch (const shim::Fault& f) {
        found = f.what();
      }
      if (found.empty()) continue;
      std::printf("%s\n", found.c_str());
      return 1;
    }
    std::printf("ok\n");
    return 0;
  }
  return argc == 1 ? 0 : 2;
}
