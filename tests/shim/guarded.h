// Memory for kernels to work on, between zones that they must leave alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

// `size` bytes, `misalignment` bytes after a multiple of 64, filled with `fill`.
class Guarded {
 public:
  explicit Guarded(size_t size, uint8_t fill = 0, size_t misalignment = 0)
      : before_(kZone + misalignment), size_(size), fill_(fill) {
    all_ = static_cast<uint8_t*>(std::aligned_alloc(64, (before_ + size + kZone + 63) / 64 * 64));
    if (all_ == nullptr) throw std::bad_alloc();
    std::memset(all_, kWatched, before_ + size + kZone);
    std::memset(data(), fill, size);
#if defined(SHIM_ASAN)
    __asan_poison_memory_region(all_, before_);
    __asan_poison_memory_region(data() + size, kZone);
#endif
  }
  ~Guarded() {
    reveal();
    std::free(all_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  uint8_t* data() const { return all_ + before_; }
  size_t size() const { return size_; }
  uint8_t fill() const { return fill_; }

  // Whether nothing wrote beside it. Lets everybody in.
  bool whole() const {
    reveal();
    for (size_t i = 0; i < before_; ++i)
      if (all_[i] != kWatched) return false;
    for (size_t i = 0; i < kZone; ++i)
      if (data()[size_ + i] != kWatched) return false;
    return true;
  }

 private:
  static constexpr size_t kZone = 128;
  static constexpr uint8_t kWatched = 0xB7;

  void reveal() const {
#if defined(SHIM_ASAN)
    __asan_unpoison_memory_region(all_, before_ + size_ + kZone);
#endif
  }

  size_t before_, size_;
  uint8_t fill_;
  uint8_t* all_;
};

}  // namespace shim
