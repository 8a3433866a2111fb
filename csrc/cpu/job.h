// What the forward and the backward job of the CPU kernels share.
#pragma once

#include "latent.h"
#include "layout.h"

namespace vk::cpu {

template <class F>
auto with_param(Param param, const F& f) {
  switch (param) {
    case Param::logvar:
      return f(std::integral_constant<Param, Param::logvar>());
    case Param::log_std:
      return f(std::integral_constant<Param, Param::log_std>());
    case Param::std:
      return f(std::integral_constant<Param, Param::std>());
    default:
      return f(std::integral_constant<Param, Param::softplus>());
  }
}

template <class R>
Bounds<R> bounds_of(const Problem& p) {
  return {static_cast<R>(0.5 * p.lo), static_cast<R>(0.5 * p.hi)};
}

// A tile's loop in its two kinds; `near` is null where it cannot serve.
template <class Tile>
struct Tiles {
  Tile near, far;
};

// `make(param, mode, draw, near)`, integral constants all, gives the loop.
template <class R, class Tile, class Make>
Tiles<Tile> tiles_for(const Problem& problem, Mode mode, bool draw, const Make& make) {
  const bool bounded = problem.lo > -std::numeric_limits<double>::infinity() ||
                       problem.hi < std::numeric_limits<double>::infinity();
  return with_param(problem.param, [&](auto p) {
    const auto of = [&](auto m, auto d) -> Tiles<Tile> {
      Tile near = nullptr;
      if constexpr (kHasNear<p.value, R>)
        if (!bounded) near = make(p, m, d, std::true_type());
      return {near, make(p, m, d, std::false_type())};
    };
    const auto with_draw = [&](auto m) { return draw ? of(m, std::true_type()) : of(m, std::false_type()); };
    if (mode == Mode::sample) return with_draw(std::integral_constant<Mode, Mode::sample>());
    if (mode == Mode::standard) return with_draw(std::integral_constant<Mode, Mode::standard>());
    return with_draw(std::integral_constant<Mode, Mode::prior>());
  });
}

template <class Tile, class Run>
void run_tile(const Tiles<Tile>& tiles, const Run& run) {
  if (tiles.near == nullptr || !run(tiles.near)) run(tiles.far);
}

// Calls job.run(begin, end) over all `count` items, each of `elements` latent elements.
template <class Job>
void run_chunks(Job& job, int64_t count, int64_t elements, Parallel parallel) {
  parallel(
      count, elements,
      [](void* context, int64_t begin, int64_t end) { static_cast<Job*>(context)->run(begin, end); }, &job);
}

template <class R>
struct TileBuffers {
  R mu[kTile], scale[kTile], prior_mu[kTile], prior_scale[kTile];
  R kl[kTile], z[kTile];  // z: or the standard deviations
};

template <class R>
struct Inputs {
  View<R> mu, scale, prior_mu, prior_scale;

  Inputs(const Problem& p, const Matrix& m)
      : mu(p.mu, p, m), scale(p.scale, p, m), prior_mu(p.prior_mu, p, m), prior_scale(p.prior_scale, p, m) {}

  TileInputs<R> read(int64_t begin, int n, bool prior, TileBuffers<R>& b) const {
    TileInputs<R> in{mu.read(begin, n, b.mu), scale.read(begin, n, b.scale), nullptr, nullptr};
    if (prior) {
      in.prior_mu = prior_mu.read(begin, n, b.prior_mu);
      in.prior_scale = prior_scale.read(begin, n, b.prior_scale);
    }
    return in;
  }
};

}  // namespace vk::cpu
