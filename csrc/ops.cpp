// Schemas, the CPU backend and the Meta kernels.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/enum_tag.h>

#include <mutex>
#include <stdexcept>

#include "cpu/latent.h"
#include "operators.h"

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
    if (call.rng != nullptr) check_offset(call.rng[1]);
    try {
      cpu::forward(call, run_parallel);
    } catch (const std::invalid_argument& e) {
      TORCH_CHECK_VALUE(false, e.what());
    }
  }

  static void backward(const Backward& call, const Tensor&) {
    if (call.rng != nullptr) check_offset(call.rng[1]);
    cpu::backward(call, run_parallel);
  }

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
  using Sizes = std::vector<c10::SymInt>;

  static Tensor state(const Tensor& like) { return at::empty({2}, like.options().dtype(at::kLong)); }

  static Tensor z(const Tensor& mu, const OptSymInt& num_samples) {
    Tensor one = at::empty_like(mu);
    if (!num_samples) return one;
    Sizes sizes{*num_samples}, strides{mu.sym_numel()};
    for (const auto& size : one.sym_sizes()) sizes.push_back(size);
    for (const auto& stride : one.sym_strides()) strides.push_back(stride);
    return at::empty_strided_symint(sizes, strides, mu.options());
  }

  static Tensors4 kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
    const auto a = check_kl<c10::SymInt>(VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS);
    const auto options = mu.options().dtype(compute_type(mu));
    const Clamp c = has_free_bits(free_bits, free_bits_per_group) ? clamp_of(clamp) : Clamp::none;
    const Reduction r = reduction_of(reduction);
    const auto batch = mu.sym_sizes().slice(0, static_cast<size_t>(batch_dims));
    Tensor value = r == Reduction::elementwise
                       ? at::empty_like(mu, options)
                       : at::empty_symint(r == Reduction::none ? batch : c10::SymIntArrayRef(), options);
    const c10::SymInt gates = c == Clamp::batch ? a.G : c10::SymInt(1);
    const c10::SymInt bytes = c == Clamp::sample ? (a.B * a.G + 7) / 8 : c10::SymInt(0);
    return {value, at::empty_symint(a.group_shape, options), at::empty_symint({gates}, options),
            at::empty_symint({bytes}, options.dtype(at::kByte))};
  }

  static Tensor sampled(VK_TARGET_ARGS, const Tensor* rng, const OptSymInt& num_samples, VK_PARAM_ARGS) {
    check_posterior(VK_TARGET_PASS, VK_PARAM_PASS);
    if (rng) check_rng(mu, *rng);
    check_num_samples(num_samples);
    return z(mu, num_samples);
  }

  static Tensor reparameterize(VK_TARGET_ARGS, const Tensor& rng, OptSymInt num_samples, VK_PARAM_ARGS) {
    return sampled(VK_TARGET_PASS, &rng, num_samples, VK_PARAM_PASS);
  }
  static Tensors2 reparameterize_draw(VK_TARGET_ARGS, const OptGenerator&, OptSymInt num_samples,
                                      VK_PARAM_ARGS) {
    return {sampled(VK_TARGET_PASS, nullptr, num_samples, VK_PARAM_PASS), state(mu)};
  }
  static Tensor reparameterize_packed(VK_PACKED_ARGS, const Tensor& rng, OptSymInt num_samples,
                                      VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    return sampled(VK_TARGET_PASS, &rng, num_samples, VK_PARAM_PASS);
  }
  static Tensors2 reparameterize_packed_draw(VK_PACKED_ARGS, const OptGenerator&, OptSymInt num_samples,
                                             VK_PARAM_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    return {sampled(VK_TARGET_PASS, nullptr, num_samples, VK_PARAM_PASS), state(moments)};
  }
  static Tensors4 gaussian_kl(VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
    return kl(VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS);
  }
  static Tensors4 gaussian_kl_packed(VK_PACKED_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    return kl(VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS);
  }
  static Tensors5 sample_kl(VK_TARGET_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples,
                            VK_KL_ARGS) {
    return std::tuple_cat(std::make_tuple(sampled(VK_TARGET_PASS, &rng, num_samples, VK_PARAM_PASS)),
                          kl(VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS));
  }
  static Tensors6 sample_kl_draw(VK_TARGET_ARGS, VK_PRIOR_ARGS, const OptGenerator&, OptSymInt num_samples,
                                 VK_KL_ARGS) {
    return std::tuple_cat(std::make_tuple(sampled(VK_TARGET_PASS, nullptr, num_samples, VK_PARAM_PASS)),
                          kl(VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS), std::make_tuple(state(mu)));
  }
  static Tensors5 sample_kl_packed(VK_PACKED_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples,
                                   VK_KL_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    return sample_kl(VK_TARGET_PASS, rng, VK_PRIOR_PASS, num_samples, VK_KL_PASS);
  }
  static Tensors6 sample_kl_packed_draw(VK_PACKED_ARGS, VK_PRIOR_ARGS, const OptGenerator& generator,
                                        OptSymInt num_samples, VK_KL_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    return sample_kl_draw(VK_TARGET_PASS, VK_PRIOR_PASS, generator, num_samples, VK_KL_PASS);
  }
  static Tensors4 latent_backward(VK_GRAD_ARGS, VK_TARGET_ARGS, VK_SAVED_ARGS) {
    check_backward<c10::SymInt>(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
    const auto gradient = [&](bool wanted) { return wanted ? at::empty_like(mu) : Tensor(); };
    return {gradient(!grad_mu_is_grad_z(VK_GRAD_PASS, mu)), gradient(true), gradient(prior_grads),
            gradient(prior_grads)};
  }
  static Tensors3 latent_backward_packed(VK_GRAD_ARGS, VK_PACKED_ARGS, VK_SAVED_ARGS) {
    const auto [mu, logvar] = halves<c10::SymInt>(VK_PACKED_PASS);
    check_backward<c10::SymInt>(VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS);
    return {at::empty_like(moments), prior_grads ? at::empty_like(mu) : Tensor(),
            prior_grads ? at::empty_like(mu) : Tensor()};
  }
  static Tensor _rng_state(const Tensor& like, const OptGenerator&) { return state(like); }
  static Tensor _philox_words(const Tensor& rng, int64_t n, int64_t) {
    check_words(rng, n);
    return at::empty({n}, rng.options());
  }
};

}  // namespace

TORCH_LIBRARY(vaekernels, m) {
  // z's numbers go by the strides of mu, so nobody may change these on the way.
  const std::vector<at::Tag> pure{at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  const std::vector<at::Tag> drawing{at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides,
                                     at::Tag::nondeterministic_seeded};
  const auto def = [&m](const std::string& schema, const std::vector<at::Tag>& tags) {
    m.def(schema.c_str(), tags);
  };
  const std::string sample = ", *, SymInt? num_samples=None, " VK_PARAM_SCHEMA ") -> ";
  const std::string prior = "Tensor? prior_mu=None, Tensor? prior_logvar=None, *, ";
  const std::string kl = VK_KL_SCHEMA ") -> ";
  const std::string draw = "*, Generator? generator=None, SymInt? num_samples=None, ";
  const std::string grads = "(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_kl_per_group, ";
  const std::string saved =
      ", Tensor? rng, Tensor? prior_mu, Tensor? prior_logvar, Tensor? gate, Tensor? open, "
      "*, " VK_BACKWARD_SCHEMA ") -> ";
  const std::string returned = "Tensor kl, Tensor kl_per_group, Tensor gate, Tensor open";

  def("_rng_state(Tensor like, *, Generator? generator=None) -> Tensor", drawing);
  def("_philox_words(Tensor rng, int n, int first_quad=0) -> Tensor", pure);
  for (const auto& [suffix, target] : {std::pair<std::string, std::string>{"", "(Tensor mu, Tensor logvar"},
                                       {"_packed", "(Tensor moments, int dim"}}) {
    const std::string prior_draw = ", Tensor? prior_mu=None, Tensor? prior_logvar=None, " + draw;
    def("reparameterize" + suffix + target + ", Tensor rng" + sample + "Tensor", pure);
    def("reparameterize" + suffix + "_draw" + target + ", " + draw +
            VK_PARAM_SCHEMA ") -> (Tensor z, Tensor rng)",
        drawing);
    def("gaussian_kl" + suffix + target + ", " + prior + kl + "(" + returned + ")", pure);
    def("sample_kl" + suffix + target + ", Tensor rng, " + prior + "SymInt? num_samples=None, " + kl +
            "(Tensor z, " + returned + ")",
        pure);
    def("sample_kl" + suffix + "_draw" + target + prior_draw + kl + "(Tensor z, " + returned +
            ", Tensor rng)",
        drawing);
    const std::string args = target.substr(1);
    const std::string results =
        suffix.empty() ? "(Tensor, Tensor, Tensor, Tensor)" : "(Tensor, Tensor, Tensor)";
    def("latent_backward" + suffix + grads + args + saved + results, pure);
    // Implemented in vaekernels/reference.py: the formulas that double backward differentiates.
    def("latent_backward" + suffix + "_reference" + grads + args + saved + results, pure);
  }
}

TORCH_LIBRARY_IMPL(vaekernels, CPU, m) { register_ops<CpuBackend>(m); }

TORCH_LIBRARY_IMPL(vaekernels, Meta, m) {
#define VK_META(name) m.impl(#name, &Meta::name);
  VK_META(_rng_state)
  VK_META(_philox_words)
  VK_META(reparameterize)
  VK_META(reparameterize_draw)
  VK_META(reparameterize_packed)
  VK_META(reparameterize_packed_draw)
  VK_META(gaussian_kl)
  VK_META(gaussian_kl_packed)
  VK_META(sample_kl)
  VK_META(sample_kl_draw)
  VK_META(sample_kl_packed)
  VK_META(sample_kl_packed_draw)
  VK_META(latent_backward)
  VK_META(latent_backward_packed)
#undef VK_META
}

}  // namespace vk
