// Small kernels, each right and with one fault planted.
//
//   faults          prints the names of the faults
//   faults --right  runs every kernel without its fault
//   faults NAME     runs one with it
//
// Each runs under several schedules. What is found wrong is printed, and the program exits with 1; it prints
// "ok" and exits with 0 where nothing is. The sanitizers end it themselves.
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
  Guarded counters{sizeof(unsigned)};

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

// Writes a whole page behind shared memory.
template <bool Wrong>
__global__ void write_far(const int* in, int* out) {
  VK_SHARED(memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  reinterpret_cast<int*>(memory)[threadIdx.x + (Wrong ? 1024 : 0)] = in[i];
  out[i] = in[i];
}

// Reads shared memory that nobody wrote.
template <bool Wrong>
__global__ void add_shared(const int* in, int* out) {
  VK_SHARED(memory);
  int* shared = reinterpret_cast<int*>(memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!Wrong) shared[threadIdx.x] = 0;
  out[i] = in[i] + shared[threadIdx.x];
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
__global__ void block_numbers(const int*, int* out) {
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
using Kernel = void (*)(const int*, int*);

template <Kernel kernel, size_t Shared = 0, int Blocks = kBlocks, int Threads = kThreads, int First = 0>
void run(Data& d) {
  VK_LAUNCH(kernel, dim3(Blocks), Threads, Shared, nullptr, d.input() + First, d.output());
}

template <bool Wrong, unsigned Counter = 0>
void run_sum(Data& d) {
  *d.counter(0) = Counter;
  VK_LAUNCH(sum_of_blocks<Wrong>, dim3(kBlocks), 32, 33 * sizeof(int), nullptr, d.input(), d.output() + 1,
            d.output(), d.counter(0));
}

template <void (*kernel)(const int*, int*, int)>
void run_n(Data& d) {
  const int n = kBlocks * kThreads;
  VK_LAUNCH(kernel, dim3(kBlocks), kThreads, 0, nullptr, d.input(), d.output(), n);
}

// What a kernel leaves of the input in[i] = i * i.
int square(int i) { return i * i; }
int reversed(int i) { return square(i / kThreads * kThreads + kThreads - 1 - i % kThreads); }
int sum_of_all(int) {
  int sum = 0;
  for (int i = 0; i < kBlocks * 32; ++i) sum += square(i);
  return sum;
}
int warp_sum(int i) {
  int sum = 0;
  for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) sum += square(j);
  return sum;
}
int pair_sum(int i) { return square(i) + square(i ^ 1); }

struct Fault {
  const char* name;
  Run right, wrong;
  int (*expected)(int i);
  int count;  // of numbers to expect
};

constexpr int kAll = kBlocks * kThreads;
constexpr size_t kInts = kThreads * sizeof(int), kMostShared = 48 * 1024;

const Fault kFaults[] = {
    {"barrier", run<reverse<false>, kInts>, run<reverse<true>, kInts>, reversed, kAll},
    {"fence", run_sum<false>, run_sum<true>, sum_of_all, 1},
    {"stale_counter", run_sum<false>, run_sum<false, 1>, sum_of_all, 1},
    {"skipped_shuffle", run<warp_sums<false>>, run<warp_sums<true>>, warp_sum, kAll},
    {"returned_lane", run<warp_sums_after_return<false>>, run<warp_sums_after_return<true>>, warp_sum, kAll},
    {"other_mask", run<warp_sums_by_mask<false>>, run<warp_sums_by_mask<true>>, pair_sum, kAll},
    {"diverged", run<diverged<false>>, run<diverged<true>>, square, kAll},
    {"early_return", run<returns_early<false>>, run<returns_early<true>>, square, kAll},
    {"short_shared", run<fill_shared<false>, kInts>, run<fill_shared<false>, kInts - 4>, square, kAll},
    {"short_shared_read", run<fill_shared<true>, kInts>, run<fill_shared<true>, kInts - 4>, square, kAll},
    {"far_past_shared", run<write_far<false>, kInts>, run<write_far<true>, kInts>, square, kAll},
    {"unwritten_shared", run<add_shared<false>, kInts>, run<add_shared<true>, kInts>, square, kAll},
    {"past_the_end", run_n<copy_numbers<false>>, run_n<copy_numbers<true>>, square, kAll},
    {"past_the_end_read", run_n<peek_at_numbers<false>>, run_n<peek_at_numbers<true>>, square, kAll},
    {"blocks_race", run<block_numbers<false>>, run<block_numbers<true>>, nullptr, 0},
    {"misaligned_vector", run<copy_vectors, 0, 1, 32>, run<copy_vectors, 0, 1, 32, 1>, nullptr, 0},
    {"too_many_threads", run<block_numbers<false>, 0, 1, 1024>, run<block_numbers<false>, 0, 1, 1025>,
     nullptr, 0},
    {"too_much_shared", run<fill_shared<false>, kMostShared>, run<fill_shared<false>, kMostShared + 1>,
     square, kAll},
};

// What is wrong after a run; empty if nothing is.
std::string judge(const Fault& fault, Run run) {
  Data d;
  for (int i = 0; i < kAll; ++i) d.input()[i] = square(i);
  try {
    run(d);
  } catch (const shim::Fault& found) {
    return found.what();
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess)
    return std::string("the launch failed: ") + cudaGetErrorString(error);
  if (!d.in.whole() || !d.out.whole() || !d.counters.whole()) return "bytes beside a tensor were written";
  if (*d.counter(0) != 0) return "a counter is left at " + std::to_string(*d.counter(0));
  for (int i = 0; i < fault.count; ++i)
    if (d.output()[i] != fault.expected(i))
      return "number " + std::to_string(i) + " is " + std::to_string(d.output()[i]) + ", expected " +
             std::to_string(fault.expected(i));
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  shim::report_crashes();
  const std::string wanted = argc == 2 ? argv[1] : "";
  int runs = 0;
  for (const Fault& fault : kFaults) {
    if (argc == 1) std::printf("%s\n", fault.name);
    if (wanted != fault.name && wanted != "--right") continue;
    for (uint64_t seed = 0; seed < 8; ++seed, ++runs) {
      shim::settings().seed = seed;
      const std::string found = judge(fault, wanted == "--right" ? fault.right : fault.wrong);
      if (found.empty()) continue;
      std::printf("%s: %s\n", fault.name, found.c_str());
      return 1;
    }
  }
  if (runs > 0) std::printf("ok\n");
  return argc == 1 || runs > 0 ? 0 : 2;
}
