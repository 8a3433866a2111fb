// The options of the latent operator: stated, read and checked here, for every backend.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "problem.h"
#include "text.h"

namespace vk {

using at::Tensor;
using OptTensor = std::optional<at::Tensor>;
using OptGenerator = std::optional<at::Generator>;
using OptInts = at::OptionalIntArrayRef;
using OptDoubles = std::optional<at::ArrayRef<double>>;
using OptSymInt = std::optional<c10::SymInt>;

// A new option is a member here and a line in kOptions.
struct Options {
  std::optional<double> free_bits;
  Clamp clamp = Clamp::batch;
  Penalty penalty = Penalty::floor;
  int64_t batch_dims = 1;
  std::optional<at::DimVector> group_dims;
  std::optional<double> balance;
  Reduction reduction = Reduction::batchmean;
  bool group_sums = false;  // kl_per_group without the division by the total weight
  Param parameterization = Param::logvar;
  std::optional<std::array<double, 2>> logvar_bounds;
};

template <class Member>
struct Option {
  using Type = Member;
  const char* name;
  Member Options::* member;
};
inline constexpr std::tuple kOptions{
    Option{"free_bits", &Options::free_bits},
    Option{"clamp", &Options::clamp},
    Option{"penalty", &Options::penalty},
    Option{"batch_dims", &Options::batch_dims},
    Option{"group_dims", &Options::group_dims},
    Option{"balance", &Options::balance},
    Option{"reduction", &Options::reduction},
    Option{"group_sums", &Options::group_sums},
    Option{"parameterization", &Options::parameterization},
    Option{"logvar_bounds", &Options::logvar_bounds},
};

// Calls f(option) for each of kOptions.
template <class F>
void for_options(const F& f) {
  std::apply([&](const auto&... option) { (f(option), ...); }, kOptions);
}

// ---- strings ---------------------------------------------------------------------------------------------

template <class E>
using Choice = std::pair<std::string_view, E>;

constexpr auto choices(Clamp) {
  return std::to_array<Choice<Clamp>>({{"batch", Clamp::batch}, {"sample", Clamp::sample}});
}
constexpr auto choices(Penalty) {
  return std::to_array<Choice<Penalty>>(
      {{"floor", Penalty::floor}, {"hinge", Penalty::hinge}, {"mask", Penalty::mask}});
}
constexpr auto choices(Reduction) {
  return std::to_array<Choice<Reduction>>({{"batchmean", Reduction::batchmean},
                                           {"sum", Reduction::sum},
                                           {"mean", Reduction::mean},
                                           {"none", Reduction::none},
                                           {"elementwise", Reduction::elementwise}});
}
constexpr auto choices(Param) {
  return std::to_array<Choice<Param>>({{"logvar", Param::logvar},
                                       {"log_std", Param::log_std},
                                       {"std", Param::std},
                                       {"softplus", Param::softplus}});
}

template <class E>
inline constexpr auto kChoices = choices(E());

template <class E>
E choice(const char* option, std::string_view given) {
  const auto& known = kChoices<E>;
  // What this library itself passes on is one of these very strings; comparing letters takes longer.
  for (const auto& [text, value] : known)
    if (given.data() == text.data()) return value;
  for (const auto& [text, value] : known)
    if (given == text) return value;
  std::string list;
  for (const auto& [text, value] : known) list += (list.empty() ? "'" : ", '") + std::string(text) + "'";
  TORCH_CHECK_VALUE(false, option, " must be one of ", list, ", got '", std::string(given), "'");
}
template <class E>
std::string_view name_of(E given) {
  for (const auto& [text, value] : kChoices<E>)
    if (given == value) return text;
  return {};
}

inline std::string numbers_text(at::ArrayRef<double> x) {
  std::string text = "(";
  for (size_t i = 0; i < x.size(); ++i) text += (i > 0 ? ", " : "") + repr(x[i]);
  return text + (x.size() == 1 ? ",)" : ")");
}

// ---- to and from the dispatcher --------------------------------------------------------------------------

// How a member of Options is passed: its type in C++ and in the schema, its default there, and both ways.
template <class Member>
struct Passed {  // one of several strings
  using Type = std::string_view;
  static constexpr char schema[] = "str";
  static std::string text(Member value) { return '"' + std::string(name_of(value)) + '"'; }
  static Type pass(Member value) { return name_of(value); }
  static Member read(const char* option, Type value) { return choice<Member>(option, value); }
};
template <class Member>
struct PassedAsItIs {
  using Type = Member;
  static Type pass(Member value) { return value; }
  static Member read(const char*, Type value) { return value; }
};
template <>
struct Passed<bool> : PassedAsItIs<bool> {
  static constexpr char schema[] = "bool";
  static std::string text(bool value) { return value ? "True" : "False"; }
};
template <>
struct Passed<int64_t> : PassedAsItIs<int64_t> {
  static constexpr char schema[] = "int";
  static std::string text(int64_t value) { return std::to_string(value); }
};
template <>
struct Passed<std::optional<double>> : PassedAsItIs<std::optional<double>> {
  static constexpr char schema[] = "float?";
  static std::string text(Type) { return "None"; }
};
template <>
struct Passed<std::optional<at::DimVector>> {
  using Type = OptInts;
  using Member = std::optional<at::DimVector>;
  static constexpr char schema[] = "int[]?";
  static std::string text(const Member&) { return "None"; }
  static Type pass(const Member& value) { return value ? Type(*value) : Type(); }
  static Member read(const char*, Type value) { return value ? Member(*value) : Member(); }
};
template <>
struct Passed<std::optional<std::array<double, 2>>> {
  using Type = OptDoubles;
  using Member = std::optional<std::array<double, 2>>;
  static constexpr char schema[] = "float[]?";
  static std::string text(const Member&) { return "None"; }
  static Type pass(const Member& value) { return value ? Type(*value) : Type(); }
  static Member read(const char* option, Type value) {
    if (!value) return {};
    TORCH_CHECK_VALUE(value->size() == 2, option, " must be None or a pair (lo, hi) of numbers, got ",
                      numbers_text(*value));
    return Member({(*value)[0], (*value)[1]});
  }
};

inline std::string options_schema() {
  std::string text;
  for_options([&](const auto& option) {
    using P = Passed<typename std::remove_cvref_t<decltype(option)>::Type>;
    text += (text.empty() ? "" : ", ") + std::string(P::schema) + ' ' + option.name + '=' +
            P::text(Options().*option.member);
  });
  return text;
}

using OptionIndices = std::make_index_sequence<std::tuple_size_v<decltype(kOptions)>>;
template <size_t I>
using PassedOption = Passed<typename std::tuple_element_t<I, std::remove_const_t<decltype(kOptions)>>::Type>;

// A kernel that takes its options as `Options`, in the form in which the dispatcher calls it.
template <auto kernel, class = decltype(kernel), class = OptionIndices>
struct Registered;

template <auto kernel, class Result, class... Args, size_t... I>
struct Registered<kernel, Result (*)(const Options&, Args...), std::index_sequence<I...>> {
  static Result call(Args... args, typename PassedOption<I>::Type... values) {
    Options o;
    ((o.*std::get<I>(kOptions).member = PassedOption<I>::read(std::get<I>(kOptions).name, values)), ...);
    return kernel(o, std::forward<Args>(args)...);
  }
};

// An operator, called through the dispatcher.
template <class Signature, class = OptionIndices>
class Operator;

template <class Result, class... Args, size_t... I>
class Operator<Result(Args...), std::index_sequence<I...>> {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Call>()) {}

  Result operator()(const Options& o, Args... args) const {
    return handle_.call(std::forward<Args>(args)...,
                        PassedOption<I>::pass(o.*std::get<I>(kOptions).member)...);
  }

 private:
  using Call = Result(Args..., typename PassedOption<I>::Type...);
  c10::TypedOperatorHandle<Call> handle_;
};

// ---- the operators ---------------------------------------------------------------------------------------

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// first, second, dim, noise, prior_mu, prior_logvar, sample, kl, num_samples, weight, free_bits_per_group.
// The noise comes from a state (`latent`) or from a generator (`latent_draw`).
template <class Result, class Noise>
using LatentCall = Result(const Tensor&, const OptTensor&, int64_t, const Noise&, const OptTensor&,
                          const OptTensor&, bool, bool, OptSymInt, const OptTensor&, const OptTensor&);
inline constexpr char kLatentSchema[] =
    ", Tensor? prior_mu=None, Tensor? prior_logvar=None, *, bool sample=True, bool kl=True, "
    "SymInt? num_samples=None, Tensor? weight=None, Tensor? free_bits_per_group=None, ";
using PureCall = LatentCall<Tensors5, OptTensor>;
using DrawCall = LatentCall<Tensors6, OptGenerator>;

// grad_z, grad_kl, grad_kl_per_group, first, second, dim, rng, prior_mu, prior_logvar, gate, open, weight,
// prior_grads
using BackwardCall = Tensors4(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor&,
                              const OptTensor&, int64_t, const OptTensor&, const OptTensor&, const OptTensor&,
                              const OptTensor&, const OptTensor&, const OptTensor&, bool);
inline constexpr char kBackwardSchema[] =
    "(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_kl_per_group, Tensor first, Tensor? second, int dim, "
    "Tensor? rng, Tensor? prior_mu, Tensor? prior_logvar, Tensor? gate, Tensor? open, *, "
    "Tensor? weight=None, bool prior_grads=False, ";

// What the forward computes, in the order in which it is returned; what a call does not want is empty.
struct Results {
  Tensor z, kl, kl_per_group, gate, open, rng;

  // Moved, since every copy counts a reference up and down.
  operator Tensors5() && {
    return {std::move(z), std::move(kl), std::move(kl_per_group), std::move(gate), std::move(open)};
  }
  operator Tensors6() && {
    return {std::move(z),    std::move(kl),   std::move(kl_per_group),
            std::move(gate), std::move(open), std::move(rng)};
  }
};

}  // namespace vk
