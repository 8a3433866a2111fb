// From an operator's arguments to a Problem: options, layout, memory. The same for every device; a backend
// adds the launch and the generator.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "problem.h"

namespace vk {

using at::Tensor;
using OptTensor = std::optional<at::Tensor>;
using OptGenerator = std::optional<at::Generator>;
using OptInts = at::OptionalIntArrayRef;
using OptDoubles = std::optional<at::ArrayRef<double>>;
using OptSymInt = std::optional<c10::SymInt>;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a forward operator computes.
struct Results {
  Tensor z, kl, per_group, gate, open, rng;

  // What each kind of operator returns of them; moved, as every copy counts a reference up and down.
  Tensors2 drawn() && { return {std::move(z), std::move(rng)}; }
  Tensors4 of_kl() && { return {std::move(kl), std::move(per_group), std::move(gate), std::move(open)}; }
  Tensors5 of_both() && {
    return {std::move(z), std::move(kl), std::move(per_group), std::move(gate), std::move(open)};
  }
  Tensors6 of_both_drawn() && {
    return {std::move(z),    std::move(kl),   std::move(per_group),
            std::move(gate), std::move(open), std::move(rng)};
  }
};

// The parts of the schemas that several operators share; the macros below keep their order in one place.
#define VK_PARAM_SCHEMA "str parameterization=\"logvar\", float[]? logvar_bounds=None"
#define VK_LAYOUT_SCHEMA                                                                 \
  "int batch_dims=1, int[]? group_dims=None, Tensor? weight=None, float? balance=None, " \
  "str reduction=\"batchmean\", bool group_sums=False, "
#define VK_KL_SCHEMA                                                                   \
  "float? free_bits=None, Tensor? free_bits_per_group=None, str clamp=\"batch\", str " \
  "penalty=\"floor\", " VK_LAYOUT_SCHEMA VK_PARAM_SCHEMA
#define VK_BACKWARD_SCHEMA "bool prior_grads=False, str clamp=\"batch\", " VK_LAYOUT_SCHEMA VK_PARAM_SCHEMA

#define VK_PARAM_ARGS std::string_view parameterization, OptDoubles logvar_bounds
#define VK_PARAM_PASS parameterization, logvar_bounds
#define VK_LAYOUT_ARGS                                                                            \
  int64_t batch_dims, OptInts group_dims, const OptTensor &weight, std::optional<double> balance, \
      std::string_view reduction, bool group_sums
#define VK_LAYOUT_PASS batch_dims, group_dims, weight, balance, reduction, group_sums
#define VK_KL_ARGS                                                                               \
  std::optional<double> free_bits, const OptTensor &free_bits_per_group, std::string_view clamp, \
      std::string_view penalty, VK_LAYOUT_ARGS, VK_PARAM_ARGS
#define VK_KL_PASS free_bits, free_bits_per_group, clamp, penalty, VK_LAYOUT_PASS, VK_PARAM_PASS
#define VK_BACKWARD_ARGS bool prior_grads, std::string_view clamp, VK_LAYOUT_ARGS, VK_PARAM_ARGS
#define VK_BACKWARD_PASS prior_grads, clamp, VK_LAYOUT_PASS, VK_PARAM_PASS

#define VK_TARGET_ARGS const Tensor &mu, const Tensor &logvar
#define VK_TARGET_PASS mu, logvar
#define VK_PACKED_ARGS const Tensor &moments, int64_t dim
#define VK_PACKED_PASS moments, dim
#define VK_PRIOR_ARGS const OptTensor &prior_mu, const OptTensor &prior_logvar
#define VK_PRIOR_PASS prior_mu, prior_logvar
#define VK_GRAD_ARGS const OptTensor &grad_z, const OptTensor &grad_kl, const OptTensor &grad_kl_per_group
#define VK_GRAD_PASS grad_z, grad_kl, grad_kl_per_group
#define VK_SAVED_ARGS \
  const OptTensor &rng, VK_PRIOR_ARGS, const OptTensor &gate, const OptTensor &open, VK_BACKWARD_ARGS
#define VK_SAVED_PASS rng, VK_PRIOR_PASS, gate, open, VK_BACKWARD_PASS

// ---- options ---------------------------------------------------------------------------------------------

template <class E, size_t N>
E choice(const char* name, std::string_view got, const std::pair<const char*, E> (&known)[N]) {
  for (const auto& [text, value] : known)
    if (got == text) return value;
  std::string list;
  for (const auto& entry : known) list += std::string(list.empty() ? "'" : ", '") + entry.first + "'";
  TORCH_CHECK_VALUE(false, name, " must be one of ", list, ", got '", std::string(got), "'");
}

inline Clamp clamp_of(std::string_view s) {
  return choice<Clamp>("clamp", s, {{"batch", Clamp::batch}, {"sample", Clamp::sample}});
}
inline Penalty penalty_of(std::string_view s) {
  return choice<Penalty>("penalty", s,
                         {{"floor", Penalty::floor}, {"hinge", Penalty::hinge}, {"mask", Penalty::mask}});
}
inline Reduction reduction_of(std::string_view s) {
  return choice<Reduction>("reduction", s,
                           {{"batchmean", Reduction::batchmean},
                            {"sum", Reduction::sum},
                            {"mean", Reduction::mean},
                            {"none", Reduction::none},
                            {"elementwise", Reduction::elementwise}});
}
inline Param param_of(std::string_view s) {
  return choice<Param>("parameterization", s,
                       {{"logvar", Param::logvar},
                        {"log_std", Param::log_std},
                        {"std", Param::std},
                        {"softplus", Param::softplus}});
}

inline void set_param(Problem& p, VK_PARAM_ARGS) {
  p.param = param_of(parameterization);
  if (logvar_bounds) {
    p.lo = (*logvar_bounds)[0];
    p.hi = (*logvar_bounds)[1];
  }
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_INTERNAL_ASSERT(false, "checked before: ", t.scalar_type());
  }
}

inline at::ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ---- layout ----------------------------------------------------------------------------------------------

enum class Role : uint8_t { batch, group, sum };
using Roles = c10::SmallVector<Role, 6>;

// Int: of the sizes, int64_t, or SymInt where they may be symbols.
template <class Int>
struct AxesOf {
  Roles roles;  // of each axis of mu
  int64_t batch_dims;
  c10::SmallVector<Int, at::kDimVectorStaticSize> group_shape;  // in the order of mu's axes
  Int B = 1, G = 1, S = 1;
};
using Axes = AxesOf<int64_t>;

inline Roles roles_of(int64_t dims, int64_t batch_dims, OptInts group_dims) {
  TORCH_CHECK_VALUE(batch_dims >= 0 && batch_dims <= dims, "batch_dims must be between 0 and ", dims,
                    ", the number of mu's axes, got ", batch_dims);
  Roles roles(static_cast<size_t>(dims), group_dims ? Role::sum : Role::group);
  std::fill_n(roles.begin(), batch_dims, Role::batch);
  if (!group_dims) return roles;
  for (const int64_t g : *group_dims) {
    TORCH_CHECK_VALUE(g >= -dims && g < dims, "group_dims must be axes of mu, which has ", dims, ", got ", g,
                      " in ", *group_dims);
    Role& role = roles[static_cast<size_t>(g < 0 ? g + dims : g)];
    TORCH_CHECK_VALUE(role != Role::batch, "group_dims must be latent axes, got ", g, " in ", *group_dims,
                      ", a batch axis (batch_dims=", batch_dims, "); leave it out or lower batch_dims");
    TORCH_CHECK_VALUE(role == Role::sum, "group_dims must name each axis once, got ", *group_dims,
                      "; drop the repeated one");
    role = Role::group;
  }
  return roles;
}

template <class Int = int64_t>
AxesOf<Int> axes_of(const Tensor& mu, int64_t batch_dims, OptInts group_dims) {
  AxesOf<Int> a{roles_of(mu.dim(), batch_dims, group_dims), batch_dims, {}};
  for (int64_t d = 0; d < mu.dim(); ++d) {
    Int size;
    if constexpr (std::is_same_v<Int, int64_t>)
      size = mu.size(d);
    else
      size = mu.sym_size(d);
    switch (a.roles[static_cast<size_t>(d)]) {
      case Role::batch:
        a.B *= size;
        break;
      case Role::group:
        a.G *= size;
        a.group_shape.push_back(size);
        break;
      default:
        a.S *= size;
    }
  }
  return a;
}

// The strides of torch.empty_like(mu).
inline at::DimVector dense_strides(const Tensor& mu) {
  if (mu.is_contiguous() || mu.is_non_overlapping_and_dense()) return at::DimVector(mu.strides());
  const auto strides = at::infer_dense_strides(mu.sizes(), mu.strides());
  return at::DimVector(strides.begin(), strides.end());
}

// New tensors beside `like`. On the CPU without the dispatcher, since a small call makes six of them.
inline Tensor empty_beside(const Tensor& like, at::IntArrayRef sizes, at::ScalarType dtype) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu(sizes, dtype))
                       : at::empty(sizes, like.options().dtype(dtype));
}
inline Tensor empty_beside(const Tensor& like, at::IntArrayRef sizes, at::IntArrayRef strides,
                           at::ScalarType dtype) {
  return like.is_cpu() ? Tensor(at::detail::empty_strided_cpu(sizes, strides, dtype))
                       : at::empty_strided(sizes, strides, like.options().dtype(dtype));
}

inline Tensor empty_dense(const Tensor& mu, at::IntArrayRef strides, at::ScalarType dtype) {
  return empty_beside(mu, mu.sizes(), strides, dtype);
}

// A [B, G, S] view of mu's axes: each of the three is a list of axes, outermost first, that one stride
// describes.
struct Layout {
  c10::SmallVector<int64_t, 6> axes[3];  // by Role
  bool groups_inner = false;

  // The strides of t; none where a list of its axes takes more than one stride. No stride matters where there
  // is no element.
  std::optional<Strides> strides(const Tensor& t) const {
    if (t.numel() == 0) return Strides{};
    int64_t stride[3] = {0, 0, 0};
    for (int role = 0; role < 3; ++role) {
      const auto& list = axes[role];
      for (size_t i = list.size(); i-- > 0;) {
        if (i + 1 == list.size())
          stride[role] = t.stride(list[i]);
        else if (t.stride(list[i]) != t.stride(list[i + 1]) * t.size(list[i + 1]))
          return std::nullopt;
      }
    }
    return Strides{stride[0], stride[1], stride[2]};
  }
};

// The axes of size above 1 in the order of z's storage, outermost first.
inline c10::SmallVector<int64_t, 6> storage_order(const Tensor& mu, at::IntArrayRef dense) {
  c10::SmallVector<int64_t, 6> order;
  for (int64_t d = 0; d < mu.dim(); ++d)
    if (mu.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return dense[static_cast<size_t>(a)] > dense[static_cast<size_t>(b)];
  });
  return order;
}

// None where z's storage is neither [B, G, S] nor [B, S, G]. A tensor without elements has any layout.
inline std::optional<Layout> layout_of(const Tensor& mu, const Axes& a, at::IntArrayRef dense) {
  Layout layout;
  if (mu.numel() == 0) {
    for (size_t d = 0; d < a.roles.size(); ++d)
      layout.axes[static_cast<int>(a.roles[d])].push_back(static_cast<int64_t>(d));
    return layout;
  }
  int last_role = 0, seen = 0;
  for (const int64_t d : storage_order(mu, dense)) {
    const Role role = a.roles[static_cast<size_t>(d)];
    const int r = static_cast<int>(role);
    auto& list = layout.axes[r];
    if (r != last_role) {
      if (!list.empty() || role == Role::batch) return std::nullopt;  // came before, or not first
      last_role = r;
    }
    // Rows and groups are counted in the order of mu's axes; within a sum the order does not matter.
    if (role != Role::sum && !list.empty() && list.back() > d) return std::nullopt;
    list.push_back(d);
    if (role == Role::group && (seen & 4) != 0) layout.groups_inner = true;
    seen |= 1 << r;
  }
  return layout;
}

// For z alone the roles do not matter: any cut of the storage order into at most three runs will do.
inline Layout sample_layout(const Tensor& mu, at::ArrayRef<const Tensor*> others, at::IntArrayRef dense) {
  Layout layout;
  int run = 2;
  const auto order = storage_order(mu, dense);
  for (size_t i = order.size(); i-- > 0;) {
    auto& list = layout.axes[run];
    const bool joins = std::all_of(others.begin(), others.end(), [&](const Tensor* t) {
      return list.empty() || t->stride(order[i]) == t->stride(list.front()) * t->size(list.front());
    });
    if (!joins && run > 0) --run;
    layout.axes[run].insert(layout.axes[run].begin(), order[i]);
  }
  return layout;
}

// The tensors of one call in the form of a Problem, with the copies that its strides could not avoid.
class Bound {
 public:
  Bound(Problem& p, const Tensor& mu, const Layout& layout, at::IntArrayRef dense)
      : p_(p), mu_(mu), layout_(layout), dense_(dense) {
    int64_t size[3] = {1, 1, 1};
    for (int role = 0; role < 3; ++role)
      for (const int64_t d : layout.axes[role]) size[role] *= mu.size(d);
    p.B = size[0];
    p.G = size[1];
    p.S = size[2];
    p.groups_inner = layout.groups_inner && p.S > 1;
  }

  Input input(const Tensor& t) {
    auto strides = layout_.strides(t);
    const Tensor* seen = &t;
    if (!strides) {
      Tensor copy = empty_dense(mu_, dense_, t.scalar_type());
      copy.copy_(t);
      kept_.push_back(std::move(copy));
      seen = &kept_.back();
      strides = layout_.strides(*seen);
    }
    return {seen->const_data_ptr(), *strides};
  }

  // Gradients of packed tensors are views that `layout_` describes whenever it describes the tensor; where it
  // does not, the kernel writes beside and `finish` copies.
  Output output(Tensor& t) {
    auto strides = layout_.strides(t);
    if (strides) return {t.data_ptr(), *strides};
    Tensor beside = empty_dense(mu_, dense_, t.scalar_type());
    strides = layout_.strides(beside);
    Output out{beside.data_ptr(), *strides};
    late_.emplace_back(t, std::move(beside));
    return out;
  }

  void finish() {
    for (auto& [to, from] : late_) to.copy_(from);
  }

  // Memory that has to live until the kernel was launched.
  const void* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back().const_data_ptr();
  }

 private:
  Problem& p_;
  const Tensor& mu_;
  const Layout& layout_;
  at::IntArrayRef dense_;
  c10::SmallVector<Tensor, 6> kept_;
  c10::SmallVector<std::pair<Tensor, Tensor>, 2> late_;
};

// The permutation that brings mu to [batch, groups, summed], and its inverse.
inline std::pair<at::DimVector, at::DimVector> by_role(const Axes& a) {
  at::DimVector order, inverse(a.roles.size(), 0);
  for (const Role role : {Role::batch, Role::group, Role::sum})
    for (size_t d = 0; d < a.roles.size(); ++d)
      if (a.roles[d] == role) order.push_back(static_cast<int64_t>(d));
  for (size_t i = 0; i < order.size(); ++i) inverse[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  return {order, inverse};
}

inline at::DimVector counting(int64_t from, size_t n) {
  at::DimVector v;
  for (size_t i = 0; i < n; ++i) v.push_back(from + static_cast<int64_t>(i));
  return v;
}

inline bool has_free_bits(std::optional<double> number, const OptTensor& per_group) {
  return number.has_value() || per_group.has_value();
}

// [n] in the compute type, dense, from a tensor that broadcasts to `shape`.
inline Tensor constant(const Tensor& t, at::IntArrayRef shape, const Tensor& mu) {
  return t.detach().to(compute_type(mu)).expand(shape).contiguous();
}

// kl's shape for a reduction.
inline at::DimVector kl_shape(const Tensor& mu, const Axes& a, Reduction reduction) {
  if (reduction == Reduction::none)
    return at::DimVector(mu.sizes().slice(0, static_cast<size_t>(a.batch_dims)));
  return {};
}

}  // namespace vk
