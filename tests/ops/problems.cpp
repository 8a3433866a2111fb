// problems BEGIN END ELEMENTS runs the problems BEGIN to END - 1, drawn at random, on the CPU kernels,
// forward and backward, and prints a line for each: the problem and a hash of every result. ELEMENTS: of a
// usual one, at most. test_vector_paths.py compiles it for several instruction sets and compares what they
// print.
//
// What goes in comes from exact arithmetic alone, so that it is the same in all of them. NaN counts as one
// number: which of two an operation hands on is the compiler's choice.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/latent.h"
#include "cpu/tile.h"

namespace {

using vk::Clamp;
using vk::DType;
using vk::Param;
using vk::Reduction;

void serial(int64_t count, int64_t, vk::cpu::Body body, void* job) { body(job, 0, count); }

// SplitMix64.
struct Random {
  uint64_t state;
  uint64_t operator()() {
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((*this)() % static_cast<uint64_t>(n)); }
  template <class T, size_t N>
  T one_of(const T (&choices)[N]) {
    return choices[below(N)];
  }
  // Multiples of 2^-16 in [-scale, scale), scale a power of two.
  float number(float scale) { return static_cast<float>(below(1 << 17) - (1 << 16)) * 0x1p-16f * scale; }
};

const float kSpecial[] = {0.f,   -0.f,   1e-3f,   -1e-3f,   1e-40f, -1e-40f, 0x1p-126f, 1.f,       -1.f,
                          43.5f, 44.f,   86.9f,   87.1f,    88.f,   -87.f,   -88.f,     100.f,     -100.f,
                          177.f, -177.f, 65504.f, -65520.f, 3e38f,  -3e38f,  INFINITY,  -INFINITY, NAN};

uint8_t plain(uint8_t x) { return x; }
int64_t plain(int64_t x) { return x; }
float plain(float x) { return x != x ? NAN : x; }
double plain(double x) { return x != x ? static_cast<double>(NAN) : x; }
vk::cpu::BFloat16 plain(vk::cpu::BFloat16 x) {
  return (x.bits & 0x7FFF) > 0x7F80 ? vk::cpu::BFloat16{0x7FC0} : x;
}
vk::cpu::Half plain(vk::cpu::Half x) { return (x.bits & 0x7FFF) > 0x7C00 ? vk::cpu::Half{0x7E00} : x; }

// FNV-1a of the bits.
template <class T>
void print(const char* name, const std::vector<T>& x) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const T& number : x) {
    const T kept = plain(number);
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&kept);
    for (size_t i = 0; i < sizeof(T); ++i) hash = (hash ^ bytes[i]) * 0x100000001B3u;
  }
  std::printf(" %s=%016llx", name, static_cast<unsigned long long>(hash));
}

template <class T, class R>
void run(Random& random, DType dtype, int64_t most) {
  const Param param =
      random.one_of({Param::logvar, Param::logvar, Param::log_std, Param::std, Param::softplus});
  const bool has_kl = random.below(4) != 0, prior = has_kl && random.below(2) != 0;
  vk::Forward forward;
  vk::Problem& p = forward;
  p.dtype = dtype;
  p.param = param;
  p.has_kl = has_kl;

  // [B, D], [B, C, S] or, stored with the channels last, [B, S, C].
  const int64_t layout = random.below(3);
  const int64_t cols = random.one_of<int64_t>(
      {1, 2, 3, 5, 8, 13, 16, 17, 32, 63, 64, 65, 100, 128, 200, 256, 500, 511, 512, 513, 700, 1024, 1300});
  const int64_t other = layout == 0 ? 1 : random.one_of<int64_t>({1, 2, 3, 7, 8, 20, 70});
  p.G = layout == 1 ? other : cols;
  p.S = layout == 1 ? cols : other;
  p.groups_inner = layout == 2;
  p.B = 1 + random.below(std::max<int64_t>(1, most / p.row_size()));
  const size_t numel = static_cast<size_t>(p.numel());

  // Inputs and gradients: dense, as halves of one tensor, or with the last two axes in the other order.
  const int64_t order = random.below(3);
  vk::Strides strides = p.dense();
  if (order == 1) strides.b *= 2;
  if (order == 2) strides = {p.row_size(), p.groups_inner ? p.S : 1, p.groups_inner ? 1 : p.G};
  const size_t stored = order == 1 ? 2 * numel : numel;

  const bool special = random.below(4) == 0;
  const auto numbers = [&](float scale, bool scales, size_t n) {
    std::vector<T> x(n);
    for (T& number : x) {
      float value = random.number(scale);
      if (special && random.below(16) == 0) value = random.one_of(kSpecial);
      if (scales && param == Param::std && !special) value = value < 0 ? -value : value;
      if constexpr (sizeof(T) == 8)
        number = static_cast<double>(value);
      else
        vk::cpu::narrow(value, number);
    }
    return x;
  };
  // Powers of two, whose products are exact: the little that is computed outside the loops over tiles is not
  // fused where the instruction set is chosen at run time, and may be where it is given.
  const auto factors = [&](size_t n) {
    std::vector<R> x(n);
    for (R& number : x) number = random.one_of<R>({0, 0.25, 0.5, 1, 2});
    return x;
  };
  const float width = random.one_of({0x1p-9f, 0.25f, 1.f, 4.f, 16.f});
  const auto mu = numbers(random.one_of({0x1p-6f, 1.f, 4.f}), false, stored);
  const auto scale = numbers(width, true, stored);
  const auto prior_mu = numbers(1.f, false, stored), prior_scale = numbers(width, true, stored);
  p.mu = {mu.data(), strides};
  p.scale = {scale.data(), strides};
  if (prior) {
    p.prior_mu = {prior_mu.data(), strides};
    p.prior_scale = {prior_scale.data(), strides};
  }
  if (random.below(4) == 0) {
    p.lo = -6;
    p.hi = 2;
  }
  const int64_t state[2] = {static_cast<int64_t>(random()), static_cast<int64_t>(random() >> 1)};
  p.rng = state;
  const bool sample = !has_kl || random.below(4) != 0;
  p.K = sample ? random.one_of<int64_t>({1, 1, 1, 2, 5}) : 1;

  const auto weight = factors(static_cast<size_t>(p.B));
  const auto thresholds = factors(static_cast<size_t>(p.G));
  size_t kl_size = 1;
  if (has_kl) {
    p.reduction = random.one_of({Reduction::batchmean, Reduction::batchmean, Reduction::sum, Reduction::mean,
                                 Reduction::none, Reduction::elementwise});
    p.clamp = random.one_of({Clamp::none, Clamp::batch, Clamp::sample});
    if (p.reduction == Reduction::elementwise) p.clamp = Clamp::none;
    if (p.reduction == Reduction::none && p.clamp == Clamp::batch) p.clamp = Clamp::sample;
    if (p.reduction == Reduction::none) kl_size = static_cast<size_t>(p.B);
    if (p.reduction == Reduction::elementwise) kl_size = numel;
    if (random.below(3) == 0) p.weight = weight.data();
    p.group_sums = random.below(4) == 0;
    forward.penalty = random.one_of({vk::Penalty::floor, vk::Penalty::hinge, vk::Penalty::mask});
    forward.free_bits = random.one_of({0.0, 0.25, 1.0});
    if (random.below(3) == 0) forward.free_bits_per_group = thresholds.data();
  }

  std::vector<T> z(sample ? numel * static_cast<size_t>(p.K) : 0);
  std::vector<R> kl(kl_size), rate(static_cast<size_t>(p.G)), gate(static_cast<size_t>(p.G));
  std::vector<uint8_t> open(static_cast<size_t>((p.cells() + 7) / 8));
  if (sample) forward.z = z.data();
  forward.kl = kl.data();
  forward.kl_per_group = rate.data();
  forward.gate = gate.data();
  forward.open = open.data();
  std::printf(
      "dtype %d param %d prior %d [%d, %d, %d] layout %d order %d K %d clamp %d reduction %d bounds %d:",
      int(dtype), int(param), prior, int(p.B), int(p.G), int(p.S), int(layout), int(order),
      sample ? int(p.K) : 0, int(p.clamp), int(p.reduction), p.hi == 2);
  vk::cpu::forward(forward, serial);
  print("z", z);
  if (has_kl) {
    print("kl", kl);
    print("rate", rate);
    print("gate", gate);
    print("open", open);
  }

  vk::Backward backward;
  static_cast<vk::Problem&>(backward) = p;
  const auto grad_z = numbers(1.f, false, z.size());
  const auto grad_kl = factors(kl_size), grad_rate = factors(rate.size());
  backward.has_z = sample;
  if (sample) backward.grad_z = grad_z.data();
  if (has_kl) {
    backward.grad_kl = grad_kl.data();
    if (random.below(2) == 0) backward.grad_kl_per_group = grad_rate.data();
    if (random.below(3) == 0) {
      backward.posterior_share = 0.25;
      backward.prior_share = 0.75;
    }
  }
  backward.gate = gate.data();
  backward.open = open.data();
  std::vector<T> grads[4];
  for (auto& grad : grads) grad.resize(stored);
  backward.grad_mu = {grads[0].data(), strides};
  backward.grad_scale = {grads[1].data(), strides};
  if (prior) {
    backward.grad_prior_mu = {grads[2].data(), strides};
    backward.grad_prior_scale = {grads[3].data(), strides};
  }
  vk::cpu::backward(backward, serial);
  print("grad_mu", grads[0]);
  print("grad_scale", grads[1]);
  if (prior) {
    print("grad_prior_mu", grads[2]);
    print("grad_prior_scale", grads[3]);
  }
  std::printf("\n");
}

// Words and normals where the quads' numbers reach 2^32, which no tensor here does.
void run_random(Random& random) {
  const uint64_t seed = random(), offset = random();
  uint64_t first = random.one_of<uint64_t>({0, 1u << 31, (1ull << 32) - 200, 1ull << 32, 1ull << 40});
  first += random() % 256;
  std::vector<int64_t> words(777);
  std::vector<float> eps(4 * 128);
  vk::cpu::philox_words(seed, offset, first, 777, words.data());
  vk::cpu::best_generator().normals(vk::philox_keys(seed, offset), first, 128, eps.data());
  std::printf("quads from %llu:", static_cast<unsigned long long>(first));
  print("words", words);
  print("eps", eps);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  for (int64_t i = std::atoll(argv[1]); i < std::atoll(argv[2]); ++i) {
    Random random{static_cast<uint64_t>(i) << 32};
    const int64_t most = i % 16 == 0 ? 20 * std::atoll(argv[3]) : std::atoll(argv[3]);
    std::printf("%lld ", static_cast<long long>(i));
    const int64_t kind = random.below(8);
    if (kind == 0) {
      run_random(random);
    } else if (kind == 1) {
      run<double, double>(random, DType::f64, most);
    } else if (kind < 4) {
      run<vk::cpu::BFloat16, float>(random, DType::bf16, most);
    } else if (kind < 6) {
      run<vk::cpu::Half, float>(random, DType::f16, most);
    } else {
      run<float, float>(random, DType::f32, most);
    }
  }
  return 0;
}
