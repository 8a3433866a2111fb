// The scheduler: threads in a block, blocks in a launch. Compiled without instrumentation, see fiber.h.
#include "shim.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "fiber.h"
#include "include/cuda_runtime.h"
#include "memory.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace shim {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kMaxShared = 48 * 1024;
// Room for reports of the sanitizers, which run on the stack of the thread that they are about.
#if defined(SHIM_ASAN) || defined(SHIM_TSAN)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

std::atomic<int64_t> launch_count{0};
thread_local cudaError_t last_error = cudaSuccess;

// ---- what TSan is told -----------------------------------------------------------------------------------

void release([[maybe_unused]] void* at) {
#if defined(SHIM_TSAN)
  __tsan_release(at);
#endif
}
void acquire([[maybe_unused]] void* at) {
#if defined(SHIM_TSAN)
  __tsan_acquire(at);
#endif
}

// ---- stacks ----------------------------------------------------------------------------------------------

void fiber_main();

// Stacks that serve one block at a time. They outlive it, because a fiber costs TSan half a millisecond.
class Stacks {
 public:
  Fiber& operator[](size_t i) {
    while (fibers_.size() <= i) {
      const size_t page = Pages::page();
      pages_.push_back(std::make_unique<Pages>(kStack + page));
      pages_.back()->guard(0);
      fibers_.push_back(std::make_unique<Fiber>(pages_.back()->data() + page, kStack, fiber_main));
    }
    return *fibers_[i];
  }

  // Those that no launch uses.
  static std::unique_ptr<Stacks> borrow() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Stacks>();
    std::unique_ptr<Stacks> stacks = std::move(idle_.back());
    idle_.pop_back();
    return stacks;
  }
  static void give_back(std::unique_ptr<Stacks> stacks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(stacks));
  }

 private:
  static inline std::mutex mutex_;
  static inline std::vector<std::unique_ptr<Stacks>> idle_;

  std::vector<std::unique_ptr<Pages>> pages_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

// ---- a block ---------------------------------------------------------------------------------------------

enum class State : uint8_t { ready, barrier, exchange, returned };

struct Thread {
  State state = State::ready;
  Meeting meeting;        // at which it waits
  uint64_t value = 0;     // given to an exchange, then got from it
  unsigned source = 0;    // the lane that it asks
  unsigned barriers = 0;  // passed
  Fiber* fiber = nullptr;
};

std::string place_of(const std::source_location& at) {
  const std::string file = at.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(at.line());
}

bool same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string text_of(const Meeting& m) {
  char mask[32] = "";
  if (m.mask != 0) std::snprintf(mask, sizeof(mask), "(0x%08x)", m.mask);
  return std::string(m.name) + mask + ", " + place_of(m.at);
}

std::string name_of(unsigned thread) {
  return "thread " + std::to_string(thread) + " (lane " + std::to_string(thread % kWarp) + ")";
}

std::string text_of(const dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

// What all blocks of a launch share.
struct Grid {
  const Launch& launch;
  void (*body)(const void*);
  const void* context;
  const uint64_t seed;
  std::vector<unsigned> order{};
  std::atomic<size_t> next{0};
  std::mutex mutex{};
  std::string fault{};  // the first one
  std::atomic<bool> stop{false};
  char done = 0;  // what TSan orders the end of all threads by
};

class Block {
 public:
  Block(Grid& grid, unsigned index, Stacks& stacks)
      : grid_(grid),
        index_(index),
        random_(grid.seed ^ (uint64_t{index} + 1) * 0xD1342543DE82EF95u),
        policy_(static_cast<Policy>(random_.below(4))),
        shared_(grid.launch.shared, random_),
        threads_(std::max(1u, grid.launch.block.x * grid.launch.block.y * grid.launch.block.z)) {
    // To TSan, what a fiber does in one block comes before what it does in the next, and a barrier orders the
    // others with it. So two blocks of one OS thread race only up to their first barriers, and where the same
    // fibers are not the same threads in both; blocks of two OS threads race whatever they do.
    const size_t shift = random_.below(threads_.size());
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].fiber = &stacks[(i + shift) % threads_.size()];
      ready_.push_back(static_cast<unsigned>(i));
    }
  }

  // Runs to the end, or to a fault.
  void run();

  static Block*& current();

  // ---- called by the threads

  void enter_fiber() { Fiber::entered(*threads_[running_].fiber, home_); }
  void run_thread();
  void barrier(const std::source_location& at);
  uint64_t exchange(const Meeting& meeting, uint64_t value, unsigned source);
  unsigned lane() const { return running_ % kWarp; }
  unsigned char* shared() const { return shared_.begin(); }

 private:
  // Which of the ready threads goes on.
  enum class Policy { any, warp_by_warp, first, last };

  void wait(State state, const Meeting& meeting) {
    threads_[running_].state = state;
    threads_[running_].meeting = meeting;
    leave();
  }
  void leave() {
    Fiber::leave(*threads_[running_].fiber, home_);
    enter_fiber();
  }
  [[noreturn]] void fail(const std::string& what) {
    fault_ = what;
    release(start_);
    for (;;) leave();
  }
  void go_on(unsigned thread) {
    threads_[thread].state = State::ready;
    ready_.push_back(thread);
  }
  unsigned pick();
  void pass_barrier();
  void check_lane(unsigned thread, const Meeting& meeting);
  std::string where(unsigned thread) const;
  std::string everybody() const;

  Grid& grid_;
  const unsigned index_;
  SplitMix random_;
  const Policy policy_;
  Shared shared_;
  std::vector<Thread> threads_;
  std::vector<unsigned> ready_;
  unsigned running_ = 0;
  size_t returned_ = 0;
  std::string fault_;
  Fiber home_;
  // What TSan orders threads by: the begin of the block, and its barriers, odd and even ones.
  void* const start_ = shared_.mark(0);
  void* const passed_[2] = {shared_.mark(1), shared_.mark(2)};
};

// Out of line, since fibers move between OS threads and an address of a thread_local must not be kept.
__attribute__((noinline)) Block*& Block::current() {
  static thread_local Block* block = nullptr;
  asm volatile("" ::: "memory");
  return block;
}

// A fiber runs the thread that it was entered for, and then, entered again, one of another block.
void fiber_main() {
  for (;;) {
    Block::current()->enter_fiber();
    Block::current()->run_thread();
  }
}

void Block::run_thread() {
  acquire(start_);
  grid_.body(grid_.context);
  release(&grid_.done);
  threads_[running_].state = State::returned;
  ++returned_;
  Fiber::leave(*threads_[running_].fiber, home_);
}

unsigned Block::pick() {
  size_t at = random_.below(ready_.size());
  if (policy_ == Policy::first) {
    at = static_cast<size_t>(std::min_element(ready_.begin(), ready_.end()) - ready_.begin());
  } else if (policy_ == Policy::last) {
    at = static_cast<size_t>(std::max_element(ready_.begin(), ready_.end()) - ready_.begin());
  } else if (policy_ == Policy::warp_by_warp) {
    const unsigned warp = running_ / kWarp;
    const auto found =
        std::find_if(ready_.begin(), ready_.end(), [warp](unsigned t) { return t / kWarp == warp; });
    if (found != ready_.end()) at = static_cast<size_t>(found - ready_.begin());
  }
  std::swap(ready_[at], ready_.back());
  const unsigned thread = ready_.back();
  ready_.pop_back();
  return thread;
}

void Block::run() {
  const dim3& grid = grid_.launch.grid;
  const dim3& block = grid_.launch.block;
  current() = this;
  blockIdx = {index_ % grid.x, index_ / grid.x % grid.y, index_ / grid.x / grid.y};
  blockDim = block;
  gridDim = grid;
  release(start_);
  while (fault_.empty() && returned_ < threads_.size()) {
    if (ready_.empty()) pass_barrier();
    if (!fault_.empty()) break;
    running_ = pick();
    threadIdx = {running_ % block.x, running_ / block.x % block.y, running_ / block.x / block.y};
    Fiber::enter(home_, *threads_[running_].fiber);
    if (random_.below(256) == 0) std::this_thread::yield();  // so that blocks do not run in step
  }
  current() = nullptr;
  if (!fault_.empty()) acquire(start_);
  if (fault_.empty() && !shared_.whole()) fault_ = "bytes beside the block's shared memory were written";
  if (fault_.empty()) return;
  throw Fault("shim: " + fault_ + "\n  in block " + text_of({blockIdx.x, blockIdx.y, blockIdx.z}) + " of " +
              text_of(grid) + ", " + std::to_string(threads_.size()) + " threads, " +
              std::to_string(grid_.launch.shared) + " bytes of shared memory, launched at " +
              place_of(grid_.launch.at) + " by " + grid_.launch.at.function_name());
}

// ---- barriers

void Block::barrier(const std::source_location& at) {
  // Alternating, so that who goes ahead to the next barrier does not order who has yet to leave this one.
  void* order = passed_[threads_[running_].barriers++ % 2];
  release(order);
  wait(State::barrier, {"__syncthreads", 0, at});
  acquire(order);
}

// When nobody can go on: everybody is at one barrier, or the block is stuck.
void Block::pass_barrier() {
  const Thread& first = threads_.front();
  for (const Thread& t : threads_) {
    if (t.state != State::barrier) {
      fault_ = "deadlock\n" + everybody();
      return;
    }
    if (!same(t.meeting.at, first.meeting.at)) fault_ = "__syncthreads in diverged code\n" + everybody();
  }
  for (unsigned i = 0; i < threads_.size(); ++i) go_on(i);
}

// ---- warps

uint64_t Block::exchange(const Meeting& meeting, uint64_t value, unsigned source) {
  Thread* warp = &threads_[running_ / kWarp * kWarp];
  const auto named = [&meeting](unsigned l) { return (meeting.mask >> l & 1) != 0; };
  if (!named(lane()))
    fail(text_of(meeting) + ": the mask leaves out " + name_of(running_) + ", which calls it");
  if (!named(source))
    fail(text_of(meeting) + ": " + name_of(running_) + " reads from a lane that the mask leaves out");
  bool all = true;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!named(l) || l == lane()) continue;
    check_lane(running_ - lane() + l, meeting);
    all = all && warp[l].state == State::exchange;
  }
  Thread& me = threads_[running_];
  me.value = value;
  me.source = source;
  if (!all) {
    wait(State::exchange, meeting);
    return me.value;
  }
  // The last one hands out the values, since those who go on give new ones.
  uint64_t values[kWarp];
  for (unsigned l = 0; l < kWarp; ++l) values[l] = named(l) ? warp[l].value : 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!named(l)) continue;
    warp[l].value = values[warp[l].source];
    if (l != lane()) go_on(running_ - lane() + l);
  }
  return me.value;
}

// That a thread which a mask names can come, or has come, to the same exchange.
void Block::check_lane(unsigned thread, const Meeting& meeting) {
  if (thread >= threads_.size()) fail(text_of(meeting) + ": the mask names lanes that the block lacks");
  const Thread& t = threads_[thread];
  if (t.state == State::returned)
    fail(text_of(meeting) + ": the mask names " + name_of(thread) + ", which has returned");
  if (t.state == State::exchange && (t.meeting.mask != meeting.mask || !same(t.meeting.at, meeting.at)))
    fail(text_of(meeting) + ": " + name_of(thread) + " waits at " + text_of(t.meeting));
}

// ---- reports

std::string Block::where(unsigned thread) const {
  switch (threads_[thread].state) {
    case State::ready:
      return "running";
    case State::returned:
      return "returned";
    default:
      return "at " + text_of(threads_[thread].meeting);
  }
}

// One line for all threads that are at the same place.
std::string Block::everybody() const {
  std::vector<std::pair<std::string, std::string>> lines;  // place, threads
  for (unsigned i = 0; i < threads_.size();) {
    const std::string place = where(i);
    const unsigned from = i;
    while (i < threads_.size() && where(i) == place) ++i;
    auto line = std::find_if(lines.begin(), lines.end(), [&](const auto& l) { return l.first == place; });
    if (line == lines.end()) line = lines.insert(line, {place, ""});
    line->second += (line->second.empty() ? "" : ", ") + std::to_string(from);
    if (i - from > 1) line->second += "-" + std::to_string(i - 1);
  }
  std::string text;
  for (const auto& [place, list] : lines)
    text += (text.empty() ? "  threads " : "\n  threads ") + list + ": " + place;
  return text;
}

// ---- a launch --------------------------------------------------------------------------------------------

// Runs block number `i` of the order, then others until there are none left, or one has a fault.
void work(Grid& grid, size_t i, std::unique_ptr<Stacks>& stacks) {
  try {
    for (; i < grid.order.size() && !grid.stop; i = grid.next++) Block(grid, grid.order[i], *stacks).run();
  } catch (const Fault& fault) {
    stacks.reset();  // threads that were left in the middle lie on them
    const std::lock_guard<std::mutex> lock(grid.mutex);
    if (grid.fault.empty()) grid.fault = fault.what();
    grid.stop = true;
  }
}

// What a GPU accepts, without asking for more shared memory than every kernel has.
cudaError_t check(const Launch& l) {
  const auto none = [](const dim3& d) { return d.x == 0 || d.y == 0 || d.z == 0; };
  if (none(l.grid) || l.grid.x > 0x7FFFFFFFu || l.grid.y > 65535 || l.grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (none(l.block) || uint64_t{l.block.x} * l.block.y * l.block.z > kMaxThreads || l.block.z > 64)
    return cudaErrorInvalidConfiguration;
  return l.shared > kMaxShared ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

int64_t launches() { return launch_count; }

void run(const Launch& launch, void (*body)(const void*), const void* context) {
  if (const cudaError_t error = check(launch); error != cudaSuccess) {
    last_error = error;
    return;
  }
  ++launch_count;
  Grid grid{launch, body, context, settings().seed};
  grid.order.resize(size_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  std::iota(grid.order.begin(), grid.order.end(), 0u);
  SplitMix random(grid.seed);
  for (size_t i = grid.order.size(); i > 1; --i) std::swap(grid.order[i - 1], grid.order[random.below(i)]);
  const size_t workers = std::min(grid.order.size(), static_cast<size_t>(std::max(1, settings().workers)));
  std::vector<std::unique_ptr<Stacks>> stacks(workers);
  grid.next = workers;  // each begins with one of its own
  for (auto& s : stacks) s = Stacks::borrow();
  std::vector<std::thread> others;
  for (size_t i = 1; i < workers; ++i) others.emplace_back([&grid, i, &s = stacks[i]] { work(grid, i, s); });
  work(grid, 0, stacks[0]);
  for (std::thread& t : others) t.join();
  for (auto& s : stacks)
    if (s) Stacks::give_back(std::move(s));
  acquire(&grid.done);
  if (!grid.fault.empty()) throw Fault(grid.fault);
}

void report_crashes() {
#if !defined(SHIM_ASAN) && !defined(SHIM_TSAN)
  struct sigaction action{};
  action.sa_handler = [](int) {
    char text[128];
    const int length =
        std::snprintf(text, sizeof(text),
                      "shim: thread (%u,%u,%u) of block (%u,%u,%u) touched memory outside of all tensors\n",
                      threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
    _exit(write(STDOUT_FILENO, text, static_cast<size_t>(length)) < 0 ? 2 : 1);
  };
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
#endif
}

void barrier(const std::source_location& at) { Block::current()->barrier(at); }
uint64_t exchange(const Meeting& meeting, uint64_t value, unsigned source) {
  return Block::current()->exchange(meeting, value, source);
}
unsigned lane() { return Block::current()->lane(); }
unsigned char* shared_memory() { return Block::current()->shared(); }

}  // namespace shim

cudaError_t cudaGetLastError() {
  const cudaError_t error = shim::last_error;
  shim::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == nullptr ? cudaStreamCaptureStatusNone : stream->capture;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
