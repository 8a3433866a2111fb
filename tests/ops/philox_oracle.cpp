// Reads lines "seed offset quad" (unsigned decimals) and prints the words of that quad by torch's generator.
#include <ATen/core/PhiloxRNGEngine.h>

#include <cinttypes>
#include <cstdio>

int main() {
  std::uint64_t seed = 0, offset = 0, quad = 0;
  while (std::scanf("%" SCNu64 " %" SCNu64 " %" SCNu64, &seed, &offset, &quad) == 3) {
    // torch counts its offset in quads of words; ours is in words, four to a quad
    at::philox_engine engine(seed, quad, offset / 4);
    for (int i = 0; i < 4; ++i) {
      std::printf("%" PRIu32 "%c", engine(), i == 3 ? '\n' : ' ');
    }
  }
  return 0;
}
