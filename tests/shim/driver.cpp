// Random problems through the launchers of csrc/cuda, judged by the oracle.
//
//   driver --count N [--first SEED] [--most ELEMENTS] [--workers N] [--verbose]
//
// Problem i is the same in every build. Of each one the forward runs three times (twice counting blocks, once
// as in a capture) and the backward twice, with other schedules, other contents of the memory that is
// written, and the random state on the other side. Checked: every result against float64; that all bits agree
// between the runs, so that nothing depends on the schedule, and nothing that has to be written was left;
// that nothing else was; that counters are zero again; how many kernels were launched.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cuda/latent.h"
#include "oracle.h"
#include "shim.h"

namespace shim {
namespace {

[[noreturn]] void wrong(const std::string& what) { throw std::runtime_error(what); }

std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", x);
  return text;
}

void check(const Expected& e, double got, const std::string& what, int64_t i) {
  if (!e.accepts(got))
    wrong(what + "[" + std::to_string(i) + "] is " + number(got) + ", float64 says " + number(e.value) +
          " within " + number(e.tolerance));
}

// ---- inputs ----------------------------------------------------------------------------------------------

struct Inputs {
  Array mu, scale, prior_mu, prior_scale;
  Array weight, thresholds;  // compute type, [B] and [G]
  double free_bits = 0;
  Array grad_z, grad_kl, grad_rate;
  Array state;  // int64[2], as bytes
  uint64_t seed = 0, offset = 0;
  double posterior_share = 1, prior_share = 1;

  std::vector<const Array*> all() const {
    return {&mu,         &scale,  &prior_mu, &prior_scale, &weight,
            &thresholds, &grad_z, &grad_kl,  &grad_rate,   &state};
  }
};

double second_of(double lv, vk::Param param) {
  const double sd = std::exp(lv / 2);
  switch (param) {
    case vk::Param::logvar:
      return lv;
    case vk::Param::log_std:
      return lv / 2;
    case vk::Param::std:
      return sd;
    default:
      return std::log(std::expm1(sd));
  }
}

// [count] numbers of the compute type.
Array numbers(const Case& c, int64_t count, uint8_t fill) {
  return Array(compute_type(c.dtype), count, fill);
}

Inputs inputs_of(const Case& c) {
  Random r(c.seed);
  std::normal_distribution<double> gauss;
  Inputs in;
  in.mu = lay(c, c.mu, 0x7F, 0);
  in.scale = lay(c, c.scale, 0x7F, 1, c.scale == Lie::halves ? in.mu : Array());
  const double size = c.near_prior ? 1e-3 : 1;
  const auto fill = [&](const Array& mu, const Array& scale, double shift) {
    for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t) {
      mu.set(mu.offset(b, g, s), (gauss(r) * 0.8 + shift) * size);
      scale.set(scale.offset(b, g, s),
                second_of(c.near_prior ? gauss(r) * size : uniform(r, -2.5, 1.5), c.param));
    });
  };
  fill(in.mu, in.scale, 0);
  if (c.prior) {
    in.prior_mu = lay(c, c.prior_lie, 0x7F);
    in.prior_scale = lay(c, c.prior_lie, 0x7F);
    fill(in.prior_mu, in.prior_scale, 0.3);
  }
  if (c.nan)
    in.mu.set(in.mu.offset(between(r, 0, c.B - 1), between(r, 0, c.G - 1), between(r, 0, c.S - 1)), NAN);
  in.seed = r();
  in.offset = 4 * (r() >> 3);
  in.state = Array(vk::DType::f64, 2, 0);
  store(in.state.data(), in.seed);
  store(in.state.data() + 8, in.offset);
  if (c.balance) {
    in.posterior_share = 0.2;
    in.prior_share = 0.8;
  }
  if (c.weight != Case::Weight::none) {
    in.weight = numbers(c, c.B, 0);
    for (int64_t b = 0; b < c.B; ++b)
      in.weight.set(b, c.weight == Case::Weight::zero || chance(r, 0.2) ? 0 : uniform(r, 0, 3));
  }
  const auto random_numbers = [&](Array& a) {
    for (int64_t i = 0; i < a.count(); ++i) a.set(i, gauss(r));
  };
  if (c.use_z && c.K > 0) {
    in.grad_z = Array(c.dtype, c.K * c.numel(), 0, c.misaligned % 3 == 1 ? c.misaligned : 0);
    random_numbers(in.grad_z);
  }
  if (c.use_kl) {
    const bool elements = c.reduction == vk::Reduction::elementwise;
    const int64_t count = elements ? c.numel() : (c.reduction == vk::Reduction::none ? c.B : 1);
    in.grad_kl = Array(compute_type(c.dtype), count, 0, elements && c.misaligned % 3 == 2 ? 1 : 0);
    random_numbers(in.grad_kl);
  }
  if (c.use_rate) {
    in.grad_rate = numbers(c, c.G, 0);
    random_numbers(in.grad_rate);
  }
  return in;
}

// Both passes look at the same elements.
struct Elements {
  std::vector<Element> all;                // in the order of z's storage
  std::vector<double> cells, cell_errors;  // KL[b, g]
  std::vector<double> rates, rate_errors, sums;
  double weight = 0;  // of all rows
};

double weight_of(const Inputs& in, int64_t b) { return in.weight ? in.weight.get(b) : 1; }

Elements elements_of(const Case& c, const Inputs& in) {
  const Precision e(c.dtype);
  Elements x;
  x.cells.assign(static_cast<size_t>(c.B * c.G), 0);
  x.cell_errors = x.cells;
  x.sums.assign(static_cast<size_t>(c.G), 0);
  x.rates = x.rate_errors = x.sums;
  for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t) {
    double prior[2];
    if (in.prior_mu) {
      prior[0] = in.prior_mu.get(in.prior_mu.offset(b, g, s));
      prior[1] = in.prior_scale.get(in.prior_scale.offset(b, g, s));
    }
    const Element at = element_of(in.mu.get(in.mu.offset(b, g, s)), in.scale.get(in.scale.offset(b, g, s)),
                                  in.prior_mu ? prior : nullptr, c, e);
    x.all.push_back(at);
    x.cells[static_cast<size_t>(b * c.G + g)] += at.kl;
    x.cell_errors[static_cast<size_t>(b * c.G + g)] += at.kl_error;
  });
  for (int64_t b = 0; b < c.B; ++b) x.weight += weight_of(in, b);
  for (size_t i = 0; i < x.cells.size(); ++i)
    x.cell_errors[i] += e.sum(static_cast<double>(c.S)) * x.cells[i];
  for (int64_t g = 0; g < c.G; ++g) {
    const auto at = static_cast<size_t>(g);
    double error = 0;
    for (int64_t b = 0; b < c.B; ++b) {
      const auto cell = static_cast<size_t>(b * c.G + g);
      x.sums[at] += weight_of(in, b) * x.cells[cell];
      error += weight_of(in, b) * x.cell_errors[cell];
    }
    x.rates[at] = x.sums[at] / x.weight;
    x.rate_errors[at] = error / x.weight + e.sum(static_cast<double>(c.B)) * x.rates[at];
  }
  return x;
}

// Thresholds about as large as what they clamp, so that some gates are open and some are not.
void choose_thresholds(const Case& c, const Elements& x, Inputs& in) {
  if (c.clamp == vk::Clamp::none) return;
  Random r(c.seed + 1);
  const std::vector<double>& values = c.clamp == vk::Clamp::batch ? x.rates : x.cells;
  const auto typical = [&] {
    const double v = values.empty() ? 1 : values[r() % values.size()];
    return std::isfinite(v) ? v * uniform(r, 0.5, 1.5) : 1.0;
  };
  const bool wide = c.dtype == vk::DType::f64;
  in.free_bits = wide ? typical() : static_cast<double>(static_cast<float>(typical()));
  if (!c.bits_per_group) return;
  in.thresholds = numbers(c, c.G, 0);
  for (int64_t g = 0; g < c.G; ++g) in.thresholds.set(g, typical());
}

double threshold(const Inputs& in, int64_t g) { return in.thresholds ? in.thresholds.get(g) : in.free_bits; }

// ---- outputs ---------------------------------------------------------------------------------------------

// What a pass writes; `fill` is what lies there before.
struct Outputs {
  std::vector<std::pair<std::string, Array>> arrays;
  std::vector<std::vector<int64_t>> written;  // of each array, the elements that have to be

  Array& add(const std::string& name, Array array, std::vector<int64_t> elements) {
    arrays.emplace_back(name, std::move(array));
    written.push_back(std::move(elements));
    return arrays.back().second;
  }
  // All of it has to be written.
  Array& add(const std::string& name, Array array) {
    std::vector<int64_t> elements(static_cast<size_t>(array.count()));
    std::iota(elements.begin(), elements.end(), 0);
    return add(name, std::move(array), std::move(elements));
  }
};

std::vector<uint8_t> bytes_of(const Array& a) {
  return {a.memory->data(), a.memory->data() + a.memory->size()};
}

// That nothing was written but what has to be.
void check_memory(const Outputs& out) {
  std::vector<std::pair<const Guarded*, std::vector<bool>>> memories;
  for (size_t i = 0; i < out.arrays.size(); ++i) {
    const auto& [name, array] = out.arrays[i];
    if (!array.memory->whole()) wrong(name + ": bytes beside it were written");
    auto found = std::find_if(memories.begin(), memories.end(),
                              [&array = array](const auto& m) { return m.first == array.memory.get(); });
    if (found == memories.end())
      found = memories.insert(found, {array.memory.get(), std::vector<bool>(array.memory->size(), false)});
    for (const int64_t e : out.written[i])
      for (int64_t j = 0; j < array.width; ++j)
        found->second[static_cast<size_t>((array.first + e) * array.width + j)] = true;
  }
  for (const auto& [memory, mine] : memories)
    for (size_t i = 0; i < mine.size(); ++i)
      if (!mine[i] && memory->data()[i] != memory->fill()) wrong("a gap between elements was written");
}

// That two runs left the same bits. They began with different ones, so that all were written.
void check_equal(const Outputs& a, const Outputs& b, const std::string& how) {
  for (size_t i = 0; i < a.arrays.size(); ++i) {
    const Array &x = a.arrays[i].second, &y = b.arrays[i].second;
    for (const int64_t e : a.written[i]) {
      const int64_t at = e * x.width;
      if (std::memcmp(x.data() + at, y.data() + at, static_cast<size_t>(x.width)) != 0)
        wrong(a.arrays[i].first + "[" + std::to_string(e) + "] is " + number(x.get(e)) + ", and " +
              number(y.get(e)) + " " + how + ": not written, or not the same for every schedule");
    }
  }
}

const Array& find(const Outputs& out, const std::string& name) {
  for (const auto& [known, array] : out.arrays)
    if (known == name) return array;
  static const Array none;
  return none;
}

// ---- calls -----------------------------------------------------------------------------------------------

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

void check_error(cudaError_t error) {
  if (error != cudaSuccess) wrong(std::string("the launch failed: ") + cudaGetErrorString(error));
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
  check_launches(before, launched ? 1 : 0, c.kl && run.capturing ? 3 : (launched ? 1 : 0), "forward");
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

// ---- judging ---------------------------------------------------------------------------------------------

bool is_open(const Outputs& out, const Case& c, int64_t b, int64_t g) {
  const int64_t cell = b * c.G + g;
  return (find(out, "open").data()[cell / 8] >> (cell % 8) & 1) != 0;
}

// f(x; threshold) as the kernel's gate decides, which is right wherever rounding leaves no doubt.
Expected clamped(const Case& c, double x, double error, double lambda, bool open, const std::string& what) {
  if (std::fabs(x - lambda) > error && open != (x >= lambda))
    wrong(what + " is " + (open ? "open" : "closed") + " at " + number(x) + ", threshold " + number(lambda));
  if (std::isnan(x)) {
    if (open) wrong(what + " is open at nan");
    return {x, 0};
  }
  switch (c.penalty) {
    case vk::Penalty::floor:
      return {open ? x : lambda, error};
    case vk::Penalty::hinge:
      return {open ? x - lambda : 0, error + Precision(c.dtype).unit * (std::fabs(x) + lambda)};
    default:
      return {open ? x : 0, open ? error : 0};
  }
}

void judge_samples(const Case& c, const Inputs& in, const Elements& x, const Outputs& out) {
  const Precision e(c.dtype);
  const Array& z = find(out, "z");
  for (int64_t i = 0; i < c.K * c.numel(); ++i) {
    const Element& at = x.all[static_cast<size_t>(i % c.numel())];
    const double noise = at.sd * normal(in.seed, in.offset, static_cast<uint64_t>(i));
    const double size = std::max({std::fabs(at.mu), std::fabs(noise), std::fabs(at.mu + noise)});
    check({at.mu + noise, e.normal * at.sd + e.term * std::fabs(noise) + 2 * ulp(size, c.dtype)}, z.get(i),
          "z", i);
  }
  if (const Array& state = find(out, "state"))
    if (load<uint64_t>(state.data()) != in.seed || load<uint64_t>(state.data() + 8) != in.offset)
      wrong("the state that was left is another one");
}

void judge_kl(const Case& c, const Inputs& in, const Elements& x, const Outputs& out) {
  const Precision e(c.dtype);
  const Array &kl = find(out, "kl"), &rates = find(out, "kl_per_group"), &gate = find(out, "gate");
  const double inverse = 1 / x.weight, weight_error = e.sum(static_cast<double>(c.B));
  const auto all = static_cast<double>(c.B * c.G);
  Expected loss{0, 0};
  const auto add = [&loss](const Expected& part, double weight) {
    loss.value += weight * part.value;
    loss.tolerance += weight * part.tolerance;
  };
  for (int64_t g = 0; g < c.G; ++g) {
    const auto at = static_cast<size_t>(g);
    const double factor = c.group_sums ? x.weight : 1;
    const double value = c.group_sums ? x.sums[at] : x.rates[at];
    const double error = x.weight > 0 ? x.rate_errors[at] * factor : 0;
    check({value, error}, rates.get(g), "kl_per_group", g);
    if (c.clamp != vk::Clamp::batch) continue;
    const bool open = !std::signbit(gate.get(g)) && x.weight != 0 && !std::isnan(x.rates[at]);
    check({open ? inverse : -inverse, weight_error * inverse}, x.weight == 0 ? -inverse : gate.get(g), "gate",
          g);
    add(clamped(c, x.rates[at], x.rate_errors[at], threshold(in, g), open, "gate " + std::to_string(g)), 1);
  }
  if (c.clamp != vk::Clamp::batch) check({inverse, weight_error * inverse}, gate.get(0), "gate", 0);
  for (int64_t b = 0; b < c.B; ++b) {
    Expected row{0, 0};
    double sizes = 0;
    for (int64_t g = 0; g < c.G; ++g) {
      const auto cell = static_cast<size_t>(b * c.G + g);
      Expected value{x.cells[cell], x.cell_errors[cell]};
      if (c.clamp == vk::Clamp::sample)
        value = clamped(c, value.value, value.tolerance, threshold(in, g), is_open(out, c, b, g),
                        "cell [" + std::to_string(b) + "," + std::to_string(g) + "]");
      row.value += value.value;
      row.tolerance += value.tolerance;
      sizes += std::fabs(value.value);
    }
    row.tolerance += e.sum(static_cast<double>(c.G)) * sizes;
    if (c.reduction == vk::Reduction::none) check(row, kl.get(b), "kl", b);
    if (c.clamp != vk::Clamp::batch) add(row, weight_of(in, b));
  }
  if (c.reduction == vk::Reduction::elementwise)
    for (int64_t i = 0; i < c.numel(); ++i)
      check({x.all[static_cast<size_t>(i)].kl, x.all[static_cast<size_t>(i)].kl_error}, kl.get(i), "kl", i);
  if (c.reduction == vk::Reduction::none || c.reduction == vk::Reduction::elementwise) return;

  loss.tolerance += e.sum(all) * std::fabs(loss.value);
  double factor = c.clamp == vk::Clamp::batch ? 1 : inverse;
  if (c.reduction == vk::Reduction::sum) factor *= x.weight;
  if (c.reduction == vk::Reduction::mean) factor /= static_cast<double>(c.G * c.S);
  if (x.weight == 0)
    loss = {c.reduction == vk::Reduction::sum ? 0.0 : NAN, 0};
  else
    loss = {loss.value * factor, loss.tolerance * factor + weight_error * std::fabs(loss.value * factor)};
  // Rows of weight 0 make 0 of a finite KL only.
  if (x.weight == 0 && c.nan && c.clamp != vk::Clamp::batch) loss.value = NAN;
  check(loss, kl.get(0), "kl", 0);
}

void judge_gradients(const Case& c, const Inputs& in, const Elements& x, const Outputs& forward,
                     const Outputs& out) {
  const Precision e(c.dtype);
  const bool kl_used = c.use_kl || c.use_rate;
  const bool rows = c.reduction == vk::Reduction::none, elements = c.reduction == vk::Reduction::elementwise;
  double gain = 0;
  if (c.use_kl && !rows && !elements) {
    gain = in.grad_kl.get(0);
    if (c.reduction != vk::Reduction::sum) gain /= x.weight;
    if (c.reduction == vk::Reduction::mean) gain /= static_cast<double>(c.G * c.S);
  }
  const Array &gate = find(forward, "gate"), grad_mu = find(out, "grad_mu"), grad_s = find(out, "grad_scale");
  const Array &grad_prior_mu = find(out, "grad_prior_mu"), &grad_prior_s = find(out, "grad_prior_scale");
  for_elements(c, [&](int64_t b, int64_t g, int64_t s, int64_t i) {
    const Element& at = x.all[static_cast<size_t>(i)];
    // The gradient with respect to the element's KL, and the size of its terms.
    double coefficient = 0, terms = 0;
    const auto add = [&](double term) {
      coefficient += term;
      terms += std::fabs(term);
    };
    if (c.use_rate) add(in.grad_rate.get(g) * (c.group_sums ? 1 : 1 / x.weight));
    if (c.use_kl && !elements) {
      bool open = true;
      if (c.clamp == vk::Clamp::batch) open = !std::signbit(gate.get(g));
      if (c.clamp == vk::Clamp::sample) open = is_open(forward, c, b, g);
      if (open) add(rows ? in.grad_kl.get(b) : gain);
    }
    coefficient *= weight_of(in, b);
    terms *= weight_of(in, b);
    if (c.use_kl && elements) add(in.grad_kl.get(i));
    double sum = 0, sum_size = 0, noise = 0, noise_size = 0, noise_error = 0;
    for (int64_t k = 0; c.use_z && k < c.K; ++k) {
      const double grad = in.grad_z.get(k * c.numel() + i);
      const double eps = normal(in.seed, in.offset, static_cast<uint64_t>(k * c.numel() + i));
      sum += grad;
      sum_size += std::fabs(grad);
      noise += grad * eps;
      noise_size += std::fabs(grad * eps);
      noise_error += std::fabs(grad) * e.normal;
    }
    if (!kl_used) coefficient = terms = 0;
    const double q = coefficient * in.posterior_share, p = coefficient * in.prior_share;
    const double q_size = terms * in.posterior_share, p_size = terms * in.prior_share;
    const auto compare = [&](const Array& array, const char* name, double value, double error, double size) {
      if (!array) return;
      check({value, error + e.term * size +
                        2 * ulp(std::max(std::fabs(value), std::isnan(size) ? 0 : size), c.dtype)},
            array.get(array.offset(b, g, s)), name, i);
    };
    compare(grad_mu, "grad_mu", sum + (kl_used ? q * at.kl_mu : 0), 0,
            sum_size + (kl_used ? q_size * std::fabs(at.kl_mu) : 0));
    if (!at.passes && !at.on_edge) compare(grad_s, "grad_scale", 0, 0, 0);
    if (at.passes && !at.on_edge)
      compare(grad_s, "grad_scale", noise * at.sd_slope + (kl_used ? q * at.kl_s : 0),
              noise_error * at.sd_slope, noise_size * at.sd_slope + (kl_used ? q_size * at.kl_s_size : 0));
    compare(grad_prior_mu, "grad_prior_mu", p * at.kl_prior_mu, 0, p_size * std::fabs(at.kl_prior_mu));
    compare(grad_prior_s, "grad_prior_scale", p * at.kl_prior_s, 0, p_size * at.kl_prior_s_size);
  });
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
    } catch (const std::exception& error) {
      std::printf("%s\n\n", error.what());
      ++failed;
    }
    if (verbose) std::fflush(stdout);
  }
  std::printf("%" PRIu64 " problems, %" PRId64 " launches, %d failed\n", count, shim::launches(), failed);
  return failed == 0 ? 0 : 1;
}
