// Random problems through the launchers of csrc/cuda, judged by the oracle.
//
//   driver --count N [--first SEED] [--most ELEMENTS] [--workers N] [--verbose]
//
// Problem i is the same in every build. Of each one the forward runs three times (twice counting blocks, once
// as in a capture) and the backward twice, with other schedules, other contents of the memory that is
// written, and the random state on the other side. Checked: every result against float64; that all bits agree
// between the runs, so that nothing depends on the schedule, and nothing that has to be written was left;
// that nothing else was; that counters are zero again; how many kernels were launched. Some problems are
// followed by one of the aggregate posterior, of which the same is checked.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "aggregates.h"
#include "cuda/latent.h"
#include "judge.h"
#include "shim.h"

namespace shim {
namespace {

void set_problem(vk::Problem& p, const Case& c, const Inputs& in) {
  p.B = c.B;
  p.G = c.G;
  p.S = c.S;
  p.K = c.K;
  p.groups_inner = c.groups_inner;
  p.dtype = c.dtype;
  p.param = c.param;
  if (c.bounded) {
    p.lo = kBounds[0];
    p.hi = kBounds[1];
  }
  const auto input = [](const Array& a) { return vk::Input{a.data(), a.stride}; };
  p.mu = input(in.mu);
  p.scale = input(in.scale);
  p.prior_mu = input(in.prior_mu);
  p.prior_scale = input(in.prior_scale);
  p.weight = in.weight.data();
  p.clamp = c.clamp;
  p.reduction = c.reduction;
  p.group_sums = c.group_sums;
  p.has_kl = c.kl;
}

void set_state(vk::Problem& p, const Inputs& in, bool host) {
  p.host_state = host;
  if (host) {
    p.seed = in.seed;
    p.offset = in.offset;
  } else {
    p.rng = reinterpret_cast<const int64_t*>(in.state.data());
  }
}

// How a run differs from the others.
struct Run {
  uint64_t seed;
  uint8_t fill;
  bool capturing, other_state;
};

struct Counters {
  Guarded memory{vk::cuda::kCounters * sizeof(unsigned)};
  unsigned* data() const { return reinterpret_cast<unsigned*>(memory.data()); }
  void check() const {
    if (!memory.whole()) wrong("bytes beside the counters were written");
    for (size_t i = 0; i < vk::cuda::kCounters; ++i)
      if (data()[i] != 0) wrong("counter " + std::to_string(i) + " is left at " + std::to_string(data()[i]));
  }
};

void check_launches(int64_t before, int64_t least, int64_t most, const char* pass) {
  const int64_t count = launches() - before;
  if (count < least || count > most)
    wrong(std::string(pass) + " took " + std::to_string(count) + " launches, not " + std::to_string(least) +
          (most > least ? " to " + std::to_string(most) : ""));
}

Outputs forward(const Case& c, const Inputs& in, const Run& run) {
  settings().seed = run.seed;
  Outputs out;
  vk::Forward call;
  set_problem(call, c, in);
  const bool host = (c.state != Case::State::device) != run.other_state;
  if (c.sample) {
    const int misaligned = c.misaligned % 4 == 1 ? 1 : 0;
    if (c.drawn()) call.z = out.add("z", Array(c.dtype, c.K * c.numel(), run.fill, misaligned)).data();
    set_state(call, in, host);
    if (host && c.state == Case::State::host_kept)
      call.rng_out = reinterpret_cast<int64_t*>(out.add("state", Array(vk::DType::f64, 2, run.fill)).data());
  }
  if (c.kl) {
    const bool elements = c.reduction == vk::Reduction::elementwise;
    const int64_t values = elements ? c.numel() : (c.reduction == vk::Reduction::none ? c.B : 1);
    call.kl = out.add("kl", numbers(c, values, run.fill)).data();
    call.kl_per_group = out.add("kl_per_group", numbers(c, c.G, run.fill)).data();
    call.gate = out.add("gate", numbers(c, c.clamp == vk::Clamp::batch ? c.G : 1, run.fill)).data();
    call.penalty = c.penalty;
    call.free_bits = in.free_bits;
    call.free_bits_per_group = in.thresholds.data();
    if (c.clamp == vk::Clamp::sample)
      call.open = out.add("open", Array::bytes((c.B * c.G + 7) / 8, run.fill)).data();
  }
  const size_t bytes = vk::cuda::forward_scratch(call);
  const Guarded scratch(bytes, run.fill);
  const Counters counters;
  const int64_t before = launches();
  check_error(vk::cuda::forward(call, bytes > 0 ? scratch.data() : nullptr,
                                run.capturing ? nullptr : counters.data(), run.capturing, nullptr));
  const bool launched = c.kl || c.drawn() || call.rng_out != nullptr;
  check_launches(before, launched ? 1 : 0, c.kl && run.capturing ? 2 : (launched ? 1 : 0), "forward");
  counters.check();
  if (!scratch.whole()) wrong("bytes beside the scratch memory were written");
  return out;
}

Outputs backward(const Case& c, const Inputs& in, const Outputs& forward, const Run& run) {
  settings().seed = run.seed;
  Outputs out;
  vk::Backward call;
  set_problem(call, c, in);
  call.posterior_share = in.posterior_share;
  call.prior_share = in.prior_share;
  if (c.use_z) set_state(call, in, (c.state != Case::State::device) != run.other_state);
  call.has_z = c.use_z;
  call.grad_z = in.grad_z.data();
  call.grad_kl = in.grad_kl.data();
  call.grad_kl_per_group = in.grad_rate.data();
  call.gate = find(forward, "gate").data();
  call.open = find(forward, "open").data();
  if (c.clamp != vk::Clamp::sample) call.open = nullptr;
  const auto output = [&](const char* name, Lie lie, int part, const Array& packed) {
    Array a = lay(c, lie, run.fill, part, packed);
    std::vector<int64_t> elements;
    for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t) { elements.push_back(a.offset(b, g, s)); });
    const Array& kept = out.add(name, std::move(a), std::move(elements));
    return vk::Output{kept.data(), kept.stride};
  };
  if (!c.no_grad_mu) call.grad_mu = output("grad_mu", c.gradients, 0, {});
  if (!c.no_grad_scale) {
    const Array mu = c.gradients == Lie::halves ? find(out, "grad_mu") : Array();
    call.grad_scale = output("grad_scale", c.gradients, 1, mu);
  }
  if (c.prior && !c.no_prior_gradients && (c.use_kl || c.use_rate)) {
    const Lie lie = c.gradients == Lie::halves ? Lie::dense : c.gradients;
    call.grad_prior_mu = output("grad_prior_mu", lie, 0, {});
    call.grad_prior_scale = output("grad_prior_scale", lie, 0, {});
  }
  const int64_t before = launches();
  check_error(vk::cuda::backward(call, nullptr));
  const int64_t wanted = c.numel() > 0 ? 1 : 0;
  check_launches(before, wanted, wanted, "backward");
  return out;
}

void solve(uint64_t index, int64_t most, bool verbose) {
  const Case c = random_case(index, most);
  if (verbose) std::printf("%" PRIu64 ": %s\n", index, c.text().c_str());
  std::string step = "inputs";
  try {
    Inputs in = inputs_of(c);
    const Elements x = elements_of(c, in);
    choose_thresholds(c, x, in);
    std::vector<std::vector<uint8_t>> before;
    for (const Array* a : in.all()) before.push_back(*a ? bytes_of(*a) : std::vector<uint8_t>());

    step = "forward";
    const Outputs first = forward(c, in, {c.seed, 0x5A, false, false});
    check_memory(first);
    if (c.drawn()) judge_samples(c, in, x, first);
    if (c.kl) judge_kl(c, in, x, first);
    step = "forward again";
    const Outputs second = forward(c, in, {c.seed + 1, 0xA5, false, false});
    check_memory(second);
    check_equal(first, second, "in another schedule");
    if (c.state != Case::State::host_kept) {
      step = "forward while capturing";
      const Outputs captured = forward(c, in, {c.seed + 2, 0x3C, true, true});
      check_memory(captured);
      check_equal(first, captured, "while capturing");
    }

    step = "backward";
    const Outputs gradients = backward(c, in, first, {c.seed + 3, 0x5A, false, false});
    check_memory(gradients);
    judge_gradients(c, in, x, first, gradients);
    step = "backward again";
    const Outputs again = backward(c, in, first, {c.seed + 4, 0xA5, false, true});
    check_memory(again);
    check_equal(gradients, again, "in another schedule");

    step = "inputs afterwards";
    for (size_t i = 0; i < before.size(); ++i)
      if (const Array& a = *in.all()[i]; a && (!a.memory->whole() || bytes_of(a) != before[i]))
        wrong("an input was changed");
  } catch (const std::exception& error) {
    wrong("problem " + std::to_string(index) + " " + c.text() + "\n" + step + ": " + error.what());
  }
}

// The kernels beside the two big ones.
void check_words() {
  const Array state(vk::DType::f64, 2, 0);
  vk::cuda::StateSource source;
  source.seed = 0x0123456789ABCDEFu;
  source.offset = 40;
  int64_t on_device[2] = {77, 80};
  for (const bool captured : {false, true}) {
    if (captured) {
      source.seed_data = on_device;
      source.offset_data = on_device + 1;
      source.step = 12;
    }
    auto* out = reinterpret_cast<int64_t*>(state.data());
    check_error(vk::cuda::write_state(source, out, nullptr));
    if (out[0] != (captured ? 77 : 0x0123456789ABCDEF) || out[1] != (captured ? 92 : 40))
      wrong("write_state");
  }
  for (const int64_t n : {0, 1, 3, 4, 5, 4097}) {
    const Array words(vk::DType::f64, n, 0x5A);
    check_error(vk::cuda::philox_words(reinterpret_cast<const int64_t*>(state.data()), 1000, n,
                                       reinterpret_cast<int64_t*>(words.data()), nullptr));
    if (!words.memory->whole()) wrong("bytes beside the words were written");
    // Words 0 and 1 of a pair give its radius and its angle.
    for (int64_t i = 0; i + 1 < n; i += 2) {
      const auto x = static_cast<double>(load<int64_t>(words.data() + 8 * i));
      const auto y = static_cast<double>(load<int64_t>(words.data() + 8 * i + 8));
      const double cosine = std::sqrt(-2 * std::log((x + 0.5) * 0x1p-32)) * std::cos(2 * M_PI * y * 0x1p-32);
      if (cosine != normal(77, 92, static_cast<uint64_t>(4000 + i))) wrong("word " + std::to_string(i));
    }
  }
}

// Every so manieth problem is followed by one of the aggregate posterior.
constexpr uint64_t kAggregates = 5;

}  // namespace
}  // namespace shim

int main(int argc, char** argv) {
  uint64_t first = 0, count = 0;
  int64_t most = 4000;
  bool verbose = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--verbose") {
      verbose = true;
      continue;
    }
    if (++i == argc) return 2;
    const long long value = std::atoll(argv[i]);
    if (flag == "--count")
      count = static_cast<uint64_t>(value);
    else if (flag == "--first")
      first = static_cast<uint64_t>(value);
    else if (flag == "--most")
      most = value;
    else if (flag == "--workers")
      shim::settings().workers = static_cast<int>(value);
    else
      return 2;
  }
  shim::report_crashes();
  int failed = 0;
  try {
    shim::check_words();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    ++failed;
  }
  for (uint64_t i = first; i < first + count; ++i) {
    try {
      shim::solve(i, most, verbose);
      if (i % shim::kAggregates == 0) shim::solve_aggregate(i, most);
    } catch (const std::exception& error) {
      std::printf("%s\n\n", error.what());
      ++failed;
    }
    if (verbose) std::fflush(stdout);
  }
  std::printf("%" PRIu64 " problems, %" PRId64 " launches, %d failed\n", count, shim::launches(), failed);
  return failed == 0 ? 0 : 1;
}
