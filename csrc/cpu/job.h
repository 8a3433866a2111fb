// Used by the forward and the backward job of the CPU kernels.
#pragma once

#include "latent.h"
#include "layout.h"

namespace vk::cpu {

// The kinds of the loop over a tile; `near` is null where it cannot be used.
template <class Tile>
struct Tiles {
  Tile near, far, rows;
};

template <Loop L>
using LoopOf = std::integral_constant<Loop, L>;

// `make(param, mode, draw, loop)`, integral constants all, gives the loop.
template <class R, class Tile, class Make>
Tiles<Tile> tiles_for(const Problem& problem, Mode mode, bool draw, const Make& make) {
  const bool bounded = problem.lo > -std::numeric_limits<double>::infinity() ||
                       problem.hi < std::numeric_limits<double>::infinity();
  return with_param(problem.param, [&](auto p) {
    const auto of = [&](auto m, auto d) -> Tiles<Tile> {
      Tile near = nullptr;
      if constexpr (kHasNear<p.value, R>)
        if (!bounded) near = make(p, m, d, LoopOf<Loop::near>());
      return {near, make(p, m, d, LoopOf<Loop::far>()), make(p, m, d, LoopOf<Loop::rows>())};
    };
    const auto with_draw = [&](auto m) { return draw ? of(m, std::true_type()) : of(m, std::false_type()); };
    if (mode == Mode::sample) return with_draw(std::integral_constant<Mode, Mode::sample>());
    if (mode == Mode::standard) return with_draw(std::integral_constant<Mode, Mode::standard>());
    return with_draw(std::integral_constant<Mode, Mode::prior>());
  });
}

// Calls run(loop, from, shape) for what makes up the tile, from column `from` on.
template <class Tile, class Run>
void run_tile(const Tiles<Tile>& tiles, TileShape shape, const Run& run) {
  if (shape.rows > 1 && shape.width % kLanes != 0) {
    run(tiles.rows, 0, shape);
    return;
  }
  in_groups(shape.width, [&](int from, int width) {
    const TileShape part{shape.rows, width};
    if (tiles.near == nullptr || !run(tiles.near, from, part)) run(tiles.far, from, part);
  });
}

// Calls job.run(begin, end) over all `count` items, each of `elements` latent elements.
template <class Job>
void run_chunks(Job& job, int64_t count, int64_t elements, Parallel parallel) {
  parallel(
      count, elements,
      [](void* context, int64_t begin, int64_t end) { static_cast<Job*>(context)->run(begin, end); }, &job);
}

// The width of a tile's rows with which most of the tensors can be read and written in place.
template <class R>
int width_of(std::initializer_list<const View<R>*> views) {
  int width = kTile;
  for (const View<R>* view : views)
    if (*view) width = std::min(width, view->width());
  return width;
}

// A tile of n elements in rows of `width` if there are several, else in one row.
inline TileShape shape_of(int n, int width) {
  return n > width && n % width == 0 ? TileShape{n / width, width} : TileShape{1, std::max(n, kLanes)};
}

template <class R>
struct TileBuffers {
  R mu[kTile], scale[kTile], prior_mu[kTile], prior_scale[kTile];
  R kl[kTile + kLanes];  // add_rows reads behind a tile
  R z[kTile];            // or the standard deviations
};

template <class R>
struct Inputs {
  View<R> mu, scale, prior_mu, prior_scale;

  Inputs(const Problem& p, const Matrix& m)
      : mu(p.mu, p, m), scale(p.scale, p, m), prior_mu(p.prior_mu, p, m), prior_scale(p.prior_scale, p, m) {}

  int width() const { return width_of<R>({&mu, &scale, &prior_mu, &prior_scale}); }

  TileInputs<R> read(int64_t begin, int n, int width, bool prior, TileBuffers<R>& b) const {
    TileInputs<R> in{mu.read(begin, n, width, b.mu), scale.read(begin, n, width, b.scale), {}, {}};
    if (prior) {
      in.prior_mu = prior_mu.read(begin, n, width, b.prior_mu);
      in.prior_scale = prior_scale.read(begin, n, width, b.prior_scale);
    }
    return in;
  }
};

}  // namespace vk::cpu
