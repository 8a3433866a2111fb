// Tells libFuzzer which code ran. GCC calls __sanitizer_cov_trace_pc at every edge; libFuzzer counts in a
// table that it is given at load time. Each edge has the place in the table that its address is hashed to.
#include <cstddef>
#include <cstdint>

extern "C" {

void __sanitizer_cov_8bit_counters_init(uint8_t* begin, uint8_t* end);
void __sanitizer_cov_pcs_init(const uintptr_t* begin, const uintptr_t* end);

// Hidden: the library that this file is linked into calls it, not the empty one of the sanitizers' runtime.
__attribute__((visibility("hidden"))) void __sanitizer_cov_trace_pc();
}

namespace {

constexpr int kBits = 17;
uint8_t counters[size_t{1} << kBits];
// libFuzzer wants an address and flags for each counter, and uses them for its reports alone.
uintptr_t places[size_t{2} << kBits];

struct Registration {
  Registration() {
    __sanitizer_cov_8bit_counters_init(counters, counters + (size_t{1} << kBits));
    __sanitizer_cov_pcs_init(places, places + (size_t{2} << kBits));
  }
} registration;

}  // namespace

void __sanitizer_cov_trace_pc() {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const auto start =
      reinterpret_cast<uintptr_t>(counters);  // moves with the library, so the difference stays
  const size_t at = ((pc - start) * 0x9E3779B97F4A7C15u) >> (64 - kBits);
  if (counters[at] < 255) ++counters[at];
  places[2 * at] = pc;
}
