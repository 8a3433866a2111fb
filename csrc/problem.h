// One call of the latent layer as plain data: what every kernel, on every device, is told.
//
// Any layout is seen as [B, G, S]: B batch rows, G free-bits groups, S elements summed in a group. Inputs
// come with the three strides of that view; z and every gradient of mu's shape are dense in z's storage
// order.
#pragma once

#include <cstdint>

#include "gaussian.h"

namespace vk {

enum class DType : uint8_t { f32, f64, bf16, f16 };
enum class Clamp : uint8_t { none, batch, sample };  // none: no free bits
enum class Reduction : uint8_t { batchmean, sum, mean, none, elementwise };

inline int item_size(DType dtype) { return dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2); }

struct Strides {
  int64_t b = 0, g = 0, s = 0;
};

struct Input {
  const void* data = nullptr;
  Strides stride;
};

struct Output {
  void* data = nullptr;
  Strides stride;
};

// "Compute type" below: float64 for float64 tensors, float32 for all others.
struct Problem {
  int64_t B = 0, G = 1, S = 1;
  int64_t K = 1;              // samples; sample k takes the random numbers after those of sample k - 1
  bool groups_inner = false;  // z is stored as [B, S, G] rather than [B, G, S]
  DType dtype = DType::f32;
  Param param = Param::logvar;
  double lo = -std::numeric_limits<double>::infinity();  // bounds on the log-variance
  double hi = std::numeric_limits<double>::infinity();

  Input mu, scale;               // scale: the second tensor, read by `param`
  Input prior_mu, prior_scale;   // null data: N(0, I)
  const void* weight = nullptr;  // [B], compute type; null: all one

  // Where z's normals come from: int64[2] (seed, offset) on the device, or the two numbers themselves. A
  // GPU's generator, while a graph is captured, has its seed in `rng` and its offset, less `offset`, in
  // `rng_offset`.
  const int64_t* rng = nullptr;
  const int64_t* rng_offset = nullptr;
  uint64_t seed = 0, offset = 0;
  bool host_state = false;

  Clamp clamp = Clamp::none;
  Reduction reduction = Reduction::batchmean;
  bool group_sums = false;  // kl_per_group without the division by the total weight
  bool has_kl = false;

  int64_t cells() const { return B * G; }
  int64_t row_size() const { return G * S; }
  int64_t numel() const { return B * G * S; }
  Strides dense() const { return groups_inner ? Strides{G * S, 1, G} : Strides{G * S, S, 1}; }
};

// The bounds on the log-variance, as bounds on the log standard deviation.
template <class R>
Bounds<R> bounds_of(const Problem& p) {
  return {static_cast<R>(0.5 * p.lo), static_cast<R>(0.5 * p.hi)};
}

struct Forward : Problem {
  Penalty penalty = Penalty::floor;
  double free_bits = 0;                       // one threshold for all groups, or
  const void* free_bits_per_group = nullptr;  // [G], compute type

  void* z = nullptr;             // [K] dense blocks; null: no sample wanted
  int64_t* rng_out = nullptr;    // where a drawing form leaves its state
  void* kl = nullptr;            // compute type: one number, [B] for "none", dense like z for "elementwise"
  void* kl_per_group = nullptr;  // [G], compute type, unclamped
  void* gate =
      nullptr;  // clamp "batch": [G], +1/W open, -1/W closed; else [1] holding 1/W. W = sum of weights
  uint8_t* open = nullptr;  // clamp "sample": bit b * G + g, least significant first, ceil(B * G / 8) bytes
};

struct Backward : Problem {
  double posterior_share = 1, prior_share = 1;  // what KL balancing leaves of each gradient

  // z was used. Without samples its gradients are sums over nothing: 0, and NaN where sd is inf, as PyTorch's
  // are.
  bool has_z = false;
  const void* grad_z = nullptr;             // [K] dense blocks
  const void* grad_kl = nullptr;            // like Forward::kl; null: not used
  const void* grad_kl_per_group = nullptr;  // [G]; null: not used
  const void* gate = nullptr;
  const uint8_t* open = nullptr;

  Output grad_mu, grad_scale, grad_prior_mu, grad_prior_scale;  // null data: not wanted
};

}  // namespace vk
