// Runs the CPU kernels on one problem and writes z and the rates as raw float32. Compiled by
// test_vector_paths.py once for each instruction set, without the run-time choice between them.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/latent.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int64_t B = std::atoll(argv[1]), D = std::atoll(argv[2]), N = B * D;
  std::vector<float> inputs(2 * N), z(N), rate(D), gate(D);
  if (std::fread(inputs.data(), sizeof(float), inputs.size(), stdin) != inputs.size()) return 3;
  const int64_t state[2] = {1234567890123, 40};
  float kl = 0;
  vk::Forward call;
  call.B = B;
  call.G = D;
  call.mu = {inputs.data(), {D, 1, 1}};
  call.scale = {inputs.data() + N, {D, 1, 1}};
  call.rng = state;
  call.z = z.data();
  call.has_kl = true;
  call.clamp = vk::Clamp::batch;
  call.free_bits = 0.25;
  call.kl = &kl;
  call.kl_per_group = rate.data();
  call.gate = gate.data();
  vk::cpu::forward(call, [](int64_t count, int64_t, vk::cpu::Body body, void* job) { body(job, 0, count); });
  std::fwrite(z.data(), sizeof(float), z.size(), stdout);
  std::fwrite(rate.data(), sizeof(float), rate.size(), stdout);
  return 0;
}
