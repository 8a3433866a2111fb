// From shapes and strides to [B, G, S], the form in which every kernel sees a tensor.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "options.h"

namespace vk {

// ---- what the axes of mu are -----------------------------------------------------------------------------

enum class Role : uint8_t { batch, group, sum };
using Roles = c10::SmallVector<Role, 6>;

// The role of each axis of a mu of `dims` axes.
inline Roles roles_of(int64_t dims, const Options& o) {
  TORCH_CHECK_VALUE(o.batch_dims >= 0 && o.batch_dims <= dims, "batch_dims must be between 0 and ", dims,
                    ", the number of mu's axes, got ", o.batch_dims);
  Roles roles(static_cast<size_t>(dims), o.group_dims ? Role::sum : Role::group);
  std::fill_n(roles.begin(), o.batch_dims, Role::batch);
  if (!o.group_dims) return roles;
  const at::IntArrayRef given(*o.group_dims);
  for (const int64_t g : given) {
    TORCH_CHECK_VALUE(g >= -dims && g < dims, "group_dims must be axes of mu, which has ", dims, ", got ", g,
                      " in ", given);
    Role& role = roles[static_cast<size_t>(g < 0 ? g + dims : g)];
    TORCH_CHECK_VALUE(role != Role::batch, "group_dims must be latent axes, got ", g, " in ", given,
                      ", a batch axis (batch_dims=", o.batch_dims, "); leave it out or lower batch_dims");
    TORCH_CHECK_VALUE(role == Role::sum, "group_dims must name each axis once, got ", given,
                      "; drop the repeated one");
    role = Role::group;
  }
  return roles;
}

// The roles of mu's axes with the sizes that follow from them. Int: int64_t, or SymInt where sizes may be
// symbols.
template <class Int>
struct GroupingOf {
  Roles roles;
  c10::SmallVector<Int, at::kDimVectorStaticSize> batch_shape, group_shape;  // in the order of mu's axes
  Int B = 1, G = 1, S = 1;
};
using Grouping = GroupingOf<int64_t>;

template <class Int>
GroupingOf<Int> grouping_of(const Tensor& mu, const Options& o) {
  GroupingOf<Int> g{roles_of(mu.dim(), o), {}, {}};
  for (int64_t d = 0; d < mu.dim(); ++d) {
    Int size;
    if constexpr (std::is_same_v<Int, int64_t>)
      size = mu.size(d);
    else
      size = mu.sym_size(d);
    switch (g.roles[static_cast<size_t>(d)]) {
      case Role::batch:
        g.B *= size;
        g.batch_shape.push_back(size);
        break;
      case Role::group:
        g.G *= size;
        g.group_shape.push_back(size);
        break;
      default:
        g.S *= size;
    }
  }
  return g;
}

// The permutation that brings mu to [batch, groups, summed], and its inverse.
inline std::pair<at::DimVector, at::DimVector> by_role(const Grouping& g) {
  at::DimVector order, inverse(g.roles.size(), 0);
  for (const Role role : {Role::batch, Role::group, Role::sum})
    for (size_t d = 0; d < g.roles.size(); ++d)
      if (g.roles[d] == role) order.push_back(static_cast<int64_t>(d));
  for (size_t i = 0; i < order.size(); ++i) inverse[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  return {order, inverse};
}

// ---- what lies where -------------------------------------------------------------------------------------

// The strides of torch.empty_like(mu).
inline at::DimVector dense_strides(const Tensor& mu) {
  if (mu.is_contiguous() || mu.is_non_overlapping_and_dense()) return at::DimVector(mu.strides());
  const auto strides = at::infer_dense_strides(mu.sizes(), mu.strides());
  return at::DimVector(strides.begin(), strides.end());
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
inline std::optional<Layout> kl_layout(const Tensor& mu, const Grouping& g, at::IntArrayRef dense) {
  Layout layout;
  if (mu.numel() == 0) {
    for (size_t d = 0; d < g.roles.size(); ++d)
      layout.axes[static_cast<int>(g.roles[d])].push_back(static_cast<int64_t>(d));
    return layout;
  }
  int last_role = 0, seen = 0;
  for (const int64_t d : storage_order(mu, dense)) {
    const Role role = g.roles[static_cast<size_t>(d)];
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
inline Layout sample_layout(const Tensor& mu, const Tensor& logvar, at::IntArrayRef dense) {
  Layout layout;
  int run = 2;
  const auto order = storage_order(mu, dense);
  for (size_t i = order.size(); i-- > 0;) {
    auto& list = layout.axes[run];
    const auto joins = [&](const Tensor& t) {
      return list.empty() || t.stride(order[i]) == t.stride(list.front()) * t.size(list.front());
    };
    if (!(joins(mu) && joins(logvar)) && run > 0) --run;
    layout.axes[run].insert(layout.axes[run].begin(), order[i]);
  }
  return layout;
}

}  // namespace vk
