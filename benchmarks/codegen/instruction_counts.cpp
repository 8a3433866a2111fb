// Runs one CPU kernel a number of times, for a tool that counts instructions: instruction_counts KERNEL
// TIMES. What TIMES = 3 takes more than TIMES = 1, by the elements of two runs, is the kernel's own share.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/latent.h"
#include "cpu/tile.h"

namespace {

constexpr int64_t kRows = 64, kColumns = 512, kElements = kRows * kColumns;

void serial(int64_t count, int64_t, vk::cpu::Body body, void* job) { body(job, 0, count); }

// Numbers as encoders give them, in the dtype's own form.
template <class T>
std::vector<T> numbers(double scale, double step) {
  std::vector<T> x(kElements);
  for (int64_t i = 0; i < kElements; ++i)
    vk::cpu::narrow(static_cast<float>(scale * std::sin(step * static_cast<double>(i))),
                    x[static_cast<size_t>(i)]);
  return x;
}

template <class T>
void run(vk::DType dtype, bool sample, bool kl, bool prior, bool channels, bool backward, int times) {
  const auto mu = numbers<T>(1, 0.7), scale = numbers<T>(0.5, 1.3), grad_z = numbers<T>(1, 2.1);
  std::vector<T> z(kElements), grads[4];
  for (auto& grad : grads) grad.resize(kElements);
  std::vector<float> rate(kColumns), gate(kColumns, 1.f / kRows);
  const int64_t state[2] = {1234567890123, 40};
  float value = 0, grad_kl = 1;
  // [B, D] with a group for each column, or [B, C, H W] with a group for each of eight channels.
  vk::Problem p;
  p.B = kRows;
  p.G = channels ? 8 : kColumns;
  p.S = kColumns / p.G;
  const vk::Strides strides{kColumns, p.S, 1};
  p.dtype = dtype;
  p.mu = {mu.data(), strides};
  p.scale = {scale.data(), strides};
  if (prior) {
    p.prior_mu = {scale.data(), strides};
    p.prior_scale = {mu.data(), strides};
  }
  p.rng = state;
  p.has_kl = kl;
  p.clamp = kl ? vk::Clamp::batch : vk::Clamp::none;
  if (backward) {
    vk::Backward call;
    static_cast<vk::Problem&>(call) = p;
    call.has_z = sample;
    call.grad_z = sample ? grad_z.data() : nullptr;
    call.grad_kl = kl ? &grad_kl : nullptr;
    call.gate = gate.data();
    call.grad_mu = {grads[0].data(), strides};
    call.grad_scale = {grads[1].data(), strides};
    if (prior) {
      call.grad_prior_mu = {grads[2].data(), strides};
      call.grad_prior_scale = {grads[3].data(), strides};
    }
    for (int i = 0; i < times; ++i) vk::cpu::backward(call, serial);
  } else {
    vk::Forward call;
    static_cast<vk::Problem&>(call) = p;
    call.free_bits = 0.25;
    call.z = sample ? z.data() : nullptr;
    call.kl = &value;
    call.kl_per_group = rate.data();
    call.gate = gate.data();
    for (int i = 0; i < times; ++i) vk::cpu::forward(call, serial);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string kernel = argv[1];
  const int times = std::atoi(argv[2]);
  const auto has = [&](const char* word) { return kernel.find(word) != std::string::npos; };
  const bool sample = !has("gaussian_kl"), kl = !has("reparameterize");
  const bool prior = has("prior"), channels = has("channels"), backward = has("backward");
  if (has("bfloat16"))
    run<vk::cpu::BFloat16>(vk::DType::bf16, sample, kl, prior, channels, backward, times);
  else if (has("float16"))
    run<vk::cpu::Half>(vk::DType::f16, sample, kl, prior, channels, backward, times);
  else
    run<float>(vk::DType::f32, sample, kl, prior, channels, backward, times);
  std::printf("%lld\n", static_cast<long long>(kElements));
  return 0;
}
