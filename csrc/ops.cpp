// Schemas, the CPU backend and the Meta kernels.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/enum_tag.h>
#include <torch/version.h>

#include <mutex>
#include <stdexcept>

#include "aggregate_launch.h"
#include "cpu/aggregate.h"
#include "cpu/latent.h"

namespace vk {
namespace {

// ---- CPU -------------------------------------------------------------------------------------------------

// Elements of latent work that a thread has to get before it is worth waking: about 35 us of it.
constexpr int64_t kElementsPerThread = 16384;

void run_parallel(int64_t count, int64_t elements, cpu::Body body, void* context) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(elements, 1));
  if (count <= grain) {
    body(context, 0, count);
    return;
  }
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

struct CpuBackend {
  // mt19937 has no offset to hand out, so each state is a fresh seed with offset 0.
  static Tensor rng_state(const Tensor& like, const OptGenerator& generator) {
    Tensor state = empty_beside(like, {2}, at::kLong);
    auto* source =
        at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
    const std::lock_guard<std::mutex> lock(source->mutex_);
    int64_t* numbers = state.data_ptr<int64_t>();
    numbers[0] = static_cast<int64_t>(source->random64());
    numbers[1] = 0;
    return state;
  }

  static Tensor draw(Forward& call, const Tensor& like, const OptGenerator& generator) {
    Tensor state = rng_state(like, generator);
    call.rng = state.const_data_ptr<int64_t>();
    return state;
  }

  static void forward(const Forward& call, const Tensor&) {
    try {
      cpu::forward(call, run_parallel);
    } catch (const std::invalid_argument& e) {
      TORCH_CHECK_VALUE(false, e.what());
    }
  }

  static void backward(const Backward& call, const Tensor&) { cpu::backward(call, run_parallel); }

  static void aggregate(const AggregateForward& call, const Tensor&) { cpu::aggregate(call, run_parallel); }
  static void aggregate(const AggregateBackward& call, const Tensor&) { cpu::aggregate(call, run_parallel); }

  static Tensor philox_words(const Tensor& rng, int64_t n, int64_t first_quad) {
    Tensor words = at::empty({n}, rng.options());
    const int64_t* state = rng.const_data_ptr<int64_t>();
    cpu::philox_words(static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1]),
                      static_cast<uint64_t>(first_quad), n, words.data_ptr<int64_t>());
    return words;
  }
};

// ---- Meta ------------------------------------------------------------------------------------------------

// The shapes, dtypes and strides of what the kernels return, for symbolic sizes too.
struct Meta {
  static Tensor state(const Tensor& like) { return at::empty({2}, like.options().dtype(at::kLong)); }

  static Tensor z(const Tensor& mu, const OptSymInt& num_samples) {
    Tensor one = at::empty_like(mu);
    if (!num_samples) return one;
    std::vector<c10::SymInt> sizes{*num_samples}, strides{mu.sym_numel()};
    for (const auto& size : one.sym_sizes()) sizes.push_back(size);
    for (const auto& stride : one.sym_strides()) strides.push_back(stride);
    return at::empty_strided_symint(sizes, strides, mu.options());
  }

  // What a call does not use is checked here: one tensor without memory brings the call here, and memory that
  // is returned for tensors of another device is memory that nobody wrote.
  static void check_unused(const char* name, const OptTensor& t, const Tensor& mu) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->device() == mu.device(), name, " must be on the tensors' device, ", mu.device(),
                      ", got ", t->device(), "; move it there");
  }

  template <class Result, class Noise>
  static Result latent(const Options& o, const Tensor& first, const OptTensor& second, int64_t dim,
                       const Noise& noise, const OptTensor& prior_mu, const OptTensor& prior_logvar,
                       bool sample, bool kl, OptSymInt num_samples, const OptTensor& weight,
                       const OptTensor& free_bits_per_group) {
    const Latent in = latent_of<c10::SymInt>(first, second, dim, prior_mu, prior_logvar, weight);
    const auto g = check_forward<c10::SymInt>(in, o, kl, num_samples, free_bits_per_group);
    check_unused("weight", weight, in.mu);
    check_unused("free_bits_per_group", free_bits_per_group, in.mu);
    const auto options = in.mu.options().dtype(compute_type(in.mu));
    const auto empty = [&](c10::SymIntArrayRef sizes) { return at::empty_symint(sizes, options); };
    Results out;
    if constexpr (std::is_same_v<Noise, OptTensor>) {
      if (sample) check_state(in.mu, noise);
      check_unused("rng", noise, in.mu);
    } else {
      check_generator(in.mu, noise);
      out.rng = sample ? state(in.mu) : at::empty({0}, options.dtype(at::kLong));
    }
    out.z = sample ? z(in.mu, num_samples) : at::empty({0}, in.mu.options());
    if (!kl) {
      out.kl = empty({0});
      out.kl_per_group = empty({0});
      out.gate = empty({0});
      out.open = at::empty({0}, options.dtype(at::kByte));
      return std::move(out);
    }
    const Clamp clamp = clamp_of(o, free_bits_per_group);
    out.kl = o.reduction == Reduction::elementwise ? at::empty_like(in.mu, options)
             : o.reduction == Reduction::none      ? empty(g.batch_shape)
                                                   : empty({});
    out.kl_per_group = empty(g.group_shape);
    out.gate = empty({clamp == Clamp::batch ? g.G : c10::SymInt(1)});
    const c10::SymInt bytes = clamp == Clamp::sample ? (g.B * g.G + 7) / 8 : c10::SymInt(0);
    out.open = at::empty_symint({bytes}, options.dtype(at::kByte));
    return std::move(out);
  }

  static Tensors4 latent_backward(const Options& o, const OptTensor& grad_z, const OptTensor& grad_kl,
                                  const OptTensor& grad_kl_per_group, const Tensor& first,
                                  const OptTensor& second, int64_t dim, const OptTensor& rng,
                                  const OptTensor& prior_mu, const OptTensor& prior_logvar,
                                  const OptTensor& gate, const OptTensor& open, const OptTensor& weight,
                                  bool prior_grads) {
    const Latent in = latent_of<c10::SymInt>(first, second, dim, prior_mu, prior_logvar, weight);
    const Incoming grads{grad_z, grad_kl, grad_kl_per_group};
    check_backward<c10::SymInt>(in, o, grads, Saved{rng, gate, open}, prior_grads);
    check_unused("rng", rng, in.mu);
    check_unused("gate", gate, in.mu);
    check_unused("open", open, in.mu);
    check_unused("weight", weight, in.mu);
    const auto gradient = [&](bool wanted) { return wanted ? at::empty_like(in.mu) : Tensor(); };
    Tensor to_first = second ? gradient(!grad_mu_is_grad_z(grads, in.mu)) : at::empty_like(first);
    return {to_first, gradient(second.has_value()), gradient(prior_grads), gradient(prior_grads)};
  }

  static Tensor rng_state(const Tensor& like, const OptGenerator&) { return state(like); }
  static Tensor philox_words(const Tensor& rng, int64_t n, int64_t) { return at::empty({n}, rng.options()); }
};

// z's numbers go by the strides of mu, so nobody may change these on the way.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 8
constexpr at::Tag kKeepStrides = at::Tag::needs_fixed_stride_order;
#else
constexpr at::Tag kKeepStrides = at::Tag::needs_exact_strides;
#endif

}  // namespace

TORCH_LIBRARY(vaekernels, m) {
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag, kKeepStrides};
  const std::vector<at::Tag> drawing{at::Tag::pt2_compliant_tag, kKeepStrides,
                                     at::Tag::nondeterministic_seeded};
  const auto def = [&m](const std::string& schema, const std::vector<at::Tag>& tags) {
    m.def(schema.c_str(), tags);
  };
  const std::string inputs = "(Tensor first, Tensor? second, int dim, ";
  const std::string results = "(Tensor z, Tensor kl, Tensor kl_per_group, Tensor gate, Tensor open";
  const std::string options = options_schema();
  const std::string backward = kBackwardSchema + options + ") -> (Tensor, Tensor, Tensor, Tensor)";
  def("latent" + inputs + "Tensor? rng" + kLatentSchema + options + ") -> " + results + ")", pure);
  def("latent_draw" + inputs + "Generator? generator" + kLatentSchema + options + ") -> " + results +
          ", Tensor rng)",
      drawing);
  def("latent_backward" + backward, pure);
  // Implemented in vaekernels/_double_backward.py: the formulas that double backward differentiates.
  def("latent_backward_reference" + backward, pure);
  def("_rng_state(Tensor like, *, Generator? generator=None) -> Tensor", drawing);
  def("_philox_words(Tensor rng, int n, int first_quad=0) -> Tensor", pure);
}

TORCH_LIBRARY_IMPL(vaekernels, CPU, m) {
  register_kernels<Operators<CpuBackend>, CpuBackend>(m);
  register_aggregate<AggregateOperators<CpuBackend>>(m);
}
TORCH_LIBRARY_IMPL(vaekernels, Meta, m) { register_kernels<Meta, Meta>(m); }

}  // namespace vk
