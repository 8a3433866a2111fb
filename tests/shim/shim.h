// A host shim: runs the kernels of csrc/cuda on the CPU, as they are.
//
// The .cu files are compiled as C++ against the headers in include/, which stand in for the toolkit's. Every
// CUDA thread is a fiber; the threads of a block share an OS thread; several blocks run at once on several OS
// threads. A seed settles in which order blocks start, and which of the threads that can run does.
//
// What is checked, in every build:
//   - __syncthreads is reached by all threads of the block, at one place, before any of them has returned;
//   - the lanes that a shuffle's mask names are there, and call the same shuffle with the same mask; a lane
//   is
//     in the mask that it gives, and reads from a lane that is;
//   - a block that can go no further is a deadlock: the report names what each thread waits at;
//   - shared memory is exactly as large as the launch says, differently filled for every block, and whole
//     around its edges afterwards; behind it lies a page that nobody may touch;
//   - a launch keeps the limits on its grid, its block and its shared memory.
// Compiled with ASan and UBSan: every byte outside of the block's shared memory, and every vector that is not
// aligned, is reported. Compiled with TSan: each CUDA thread is a thread of its own to it, in whatever order
// fibers run. __syncthreads orders the threads of a block; atomics (`arrive_last` in csrc/cuda/reduce.cuh)
// order blocks as far as their memory order goes; a shuffle orders nothing, as CUDA promises nothing. A
// missing barrier is then a data race in any schedule, and a counter that does not acquire and release one
// between any two blocks of different OS threads.
//
// What is not: PTX. The code under __CUDA_ARCH__ is not compiled, so the approximate logarithm, exponential,
// sine and square root of the GPU, and all other inline assembly, have a host twin here: philox.h and math.h
// give the CPU's numbers. Nor caches (a value read by __ldg must not change while the kernel runs), launch
// bounds, occupancy, speed, or blocks that wait for one another.
//
// What a kernel has to do to run here:
//   - be launched by VK_LAUNCH, and name its dynamic shared memory by VK_SHARED; it has no __shared__
//     variables;
//   - keep inline PTX and intrinsics that include/ lacks under __CUDA_ARCH__, with a host twin beside them;
//   - order blocks by a host atomic with the memory order of its PTX twin. Fences are not understood;
//   - keep to 48 kB of shared memory and 1024 threads.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>

namespace shim {

// What the checks above found; the message says where, and in which threads.
class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  uint64_t seed = 0;  // of the schedule
  int workers = 4;    // OS threads, so blocks at once
};
Settings& settings();

// Launches so far that passed the check of their configuration.
int64_t launches();

// Ends the program with a report where a thread touches memory that nobody may touch. The sanitizers have
// reports of their own.
void report_crashes();

// ---- launching -------------------------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared;
  std::source_location at;
};

// Calls body(context) in every thread of every block, and returns when all have returned. Throws Fault.
void run(const Launch& launch, void (*body)(const void*), const void* context);

template <class Body>
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, const Body& body,
            std::source_location at = std::source_location::current()) {
  run({grid, block, shared, at}, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

// ---- for the running thread ------------------------------------------------------------------------------

// Where threads meet.
struct Meeting {
  const char* name = nullptr;
  unsigned mask = 0;  // of a warp's lanes
  std::source_location at;
};

void barrier(const std::source_location& at);
// The `value` of lane `source`, once all lanes of the mask are here.
uint64_t exchange(const Meeting& meeting, uint64_t value, unsigned source);
unsigned lane();
unsigned char* shared_memory();

}  // namespace shim
