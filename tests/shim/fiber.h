// Fibers: stacks that one OS thread switches between, made known to the sanitizers.
//
// SHIM_ASAN and SHIM_TSAN say which sanitizer the program is linked with. They are set for the shim itself
// too, which is compiled without instrumentation: what it shares between fibers is its own business.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(SHIM_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, and goes on where `to` was left. swapcontext does the
// same with two system calls.
extern "C" void shim_switch_stack(void** from, void* to);
asm(R"(
.text
.globl shim_switch_stack
.hidden shim_switch_stack
.type shim_switch_stack, @function
shim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch_stack, .-shim_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace shim {

// A stack that runs `entry`, which never returns but leaves again and again. The OS thread's own stack is the
// `home` from which fibers are entered and to which they leave.
class Fiber {
 public:
  // The stack of the OS thread.
  Fiber() {
#if defined(SHIM_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  Fiber(unsigned char* stack, size_t size, void (*entry)()) : bottom_(stack), size_(size) {
#if defined(__x86_64__)
    // What shim_switch_stack pops, and an address to return to; the entry finds its stack as after a call.
    void** top = reinterpret_cast<void**>(stack + size) - 1;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#if defined(SHIM_TSAN)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  ~Fiber() {
#if defined(SHIM_TSAN)
    if (bottom_ != nullptr) __tsan_destroy_fiber(tsan_);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From home to a fiber; returns when it leaves.
  static void enter(Fiber& home, Fiber& fiber) {
    prepare(home, fiber);
    swap(home, fiber);
#if defined(SHIM_ASAN)
    __sanitizer_finish_switch_fiber(home.fake_stack_, nullptr, nullptr);
#endif
  }
  // From a fiber to home; returns when it is entered again, maybe from another one.
  static void leave(Fiber& fiber, Fiber& home) {
    prepare(fiber, home);
    swap(fiber, home);
  }
  // What a fiber does first, and after each return from `leave`.
  static void entered([[maybe_unused]] Fiber& fiber, [[maybe_unused]] Fiber& home) {
#if defined(SHIM_ASAN)
    __sanitizer_finish_switch_fiber(fiber.fake_stack_, &home.bottom_, &home.size_);
#endif
  }

 private:
  static void prepare([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to) {
#if defined(SHIM_TSAN)
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SHIM_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
  }
  static void swap(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
    shim_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
  }

#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] size_t size_ = 0;
#if defined(SHIM_ASAN)
  void* fake_stack_ = nullptr;
#endif
#if defined(SHIM_TSAN)
  void* tsan_ = nullptr;
#endif
};

}  // namespace shim
