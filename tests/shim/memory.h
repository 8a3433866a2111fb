// Memory of the shim's own: pages, and the shared memory of a block.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#if defined(SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

// splitmix64 (Steele et al. 2014), the randomness of schedules.
class SplitMix {
 public:
  explicit SplitMix(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(next() % n); }

 private:
  uint64_t state_;
};

// Memory from the system, whole pages.
class Pages {
 public:
  explicit Pages(size_t bytes) : size_(round_up(bytes)) {
    data_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() {
#if defined(SHIM_ASAN)
    __asan_unpoison_memory_region(data_, size_);
#endif
    munmap(data_, size_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(data_); }
  size_t size() const { return size_; }

  static size_t page() {
    static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return size;
  }
  static size_t round_up(size_t bytes) { return (bytes + page() - 1) / page() * page(); }
  // Makes one page a trap.
  void guard(size_t offset) { mprotect(data() + offset, page(), PROT_NONE); }

 private:
  void* data_;
  size_t size_;
};

// A block's shared memory. Its end lies at a page that may not be touched, or up to 15 bytes before it, since
// its beginning is aligned; those bytes, and those between the page's start and the beginning, are watched.
class Shared {
 public:
  Shared(size_t bytes, SplitMix& random)
      : pages_(2 * Pages::page() + Pages::round_up(bytes)),
        begin_(pages_.data() + pages_.size() - Pages::page() - (bytes + 15) / 16 * 16),
        bytes_(bytes) {
    pages_.guard(0);
    pages_.guard(pages_.size() - Pages::page());
    for (unsigned char* p = first(); p != last(); ++p) *p = kWatched;
    // Nothing, or noise: numbers that were never written become NaN or differ from schedule to schedule.
    const bool nan = random.below(2) == 0;
    for (unsigned char* p = begin_; p != begin_ + bytes_; ++p)
      *p = nan ? 0xFF : static_cast<unsigned char>(random.next());
#if defined(SHIM_ASAN)
    __asan_poison_memory_region(first(), static_cast<size_t>(begin_ - first()));
    __asan_poison_memory_region(begin_ + bytes_, static_cast<size_t>(last() - begin_) - bytes_);
#endif
  }

  unsigned char* begin() const { return begin_; }

  // Addresses that TSan orders the block's threads by. Nobody reads them or writes to them; they come and go
  // with the block, so that no order among other blocks' threads sticks to them.
  void* mark(size_t i) const { return pages_.data() + 8 * i; }

  bool whole() const {
    const auto watched = [](unsigned char x) { return x == kWatched; };
    return std::all_of(first(), begin_, watched) && std::all_of(begin_ + bytes_, last(), watched);
  }

 private:
  static constexpr unsigned char kWatched = 0xA5;
  unsigned char* first() const { return pages_.data() + Pages::page(); }
  unsigned char* last() const { return pages_.data() + pages_.size() - Pages::page(); }

  Pages pages_;
  unsigned char* begin_;
  size_t bytes_;
};

}  // namespace shim
