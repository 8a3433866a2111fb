#include <cmath>
#include <cstring>
#include <memory>

#include "job.h"

namespace vk::cpu {
namespace {

template <class R>
using BackwardTile = bool (*)(const TileInputs<R>&, Bounds<R>, const R*, const R*, const R*, bool, R, R,
                              const TileGradients<R>&, TileShape);
template <class R>
Tiles<BackwardTile<R>> backward_tiles(const Problem& problem, Mode mode, bool draw) {
  return tiles_for<R, BackwardTile<R>>(problem, mode, draw, [](auto p, auto m, auto d, auto loop) {
    return backward_tile<p.value, m.value, d.value, loop.value, R>;
  });
}

// n numbers of grad_z from element `at` on, of all samples one behind the other: where they are if that many
// `wanted` ones can be read there, else in `buffer`.
template <class R>
const R* read_grad_z(const Backward& p, int64_t at, int n, int wanted, R* buffer) {
  return as_type<R>(p.dtype, [&](auto zero) -> const R* {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(p.grad_z) + at;
    if constexpr (std::is_same_v<T, R>) {
      if (n == wanted) return data;
    }
    load_rows(data, 0, 1, n, buffer);
    return buffer;
  });
}

// The sums over K samples of a few elements of grad_z and of grad_z eps.
//
// A tile holds as many whole samples as fit, so that each of its places belongs to one element; the places of
// an element are added up at the end. Chunks of a fixed number of samples, added in order: no sum depends on
// the number of threads.
template <class R>
class RepeatedSums {
 public:
  RepeatedSums(const Backward& call, const Normals<R>& normals)
      : p_(call),
        normals_(normals),
        period_(static_cast<int>(call.numel())),
        width_(kTile / period_ * period_),
        chunk_(kChunk / kTile * width_),
        total_(call.K * period_) {}

  void operator()(Parallel parallel, R* sum, R* noise) {
    const int64_t count = (total_ + chunk_ - 1) / chunk_;
    parts_.reset(new double[static_cast<size_t>(count * 2 * period_)]);
    run_chunks(*this, count, std::min(total_, chunk_), parallel);
    for (int i = 0; i < period_; ++i) {
      double of_sum = 0, of_noise = 0;
      for (int64_t part = 0; part < count; ++part) {
        of_sum += parts_[static_cast<size_t>(2 * part * period_ + i)];
        of_noise += parts_[static_cast<size_t>((2 * part + 1) * period_ + i)];
      }
      sum[i] = static_cast<R>(of_sum);
      noise[i] = static_cast<R>(of_noise);
    }
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) chunk(i);
  }

 private:
  void chunk(int64_t index) const {
    typename Normals<R>::Buffer buffer;
    R grad_z[kTile], last[kTile], sum[kTile] = {}, noise[kTile] = {};
    const int64_t stop = std::min(total_, (index + 1) * chunk_);
    for (int64_t i = index * chunk_; i < stop; i += width_) {
      const int n = static_cast<int>(std::min<int64_t>(width_, stop - i));
      const R* eps = normals_(0, i, n, buffer);
      const R* grad = read_grad_z(p_, i, n, padded(n), grad_z);
      if (n < width_) {
        // The places behind the last tile's end belong to elements too, and get zeros.
        std::copy_n(grad, n, grad_z);
        std::fill_n(grad_z + n, padded(n) - n, R(0));
        std::copy_n(eps, n, last);
        std::fill_n(last + n, padded(n) - n, R(0));
        grad = grad_z;
        eps = last;
      }
      add_noise_tile(grad, eps, sum, noise, padded(n));
    }
    double* out = &parts_[static_cast<size_t>(2 * index * period_)];
    fold(sum, out);
    fold(noise, out + period_);
  }

  void fold(const R* places, double* out) const {
    std::fill_n(out, period_, 0.0);
    for (int j = 0; j < width_; j += period_)
      for (int i = 0; i < period_; ++i) out[i] += static_cast<double>(places[j + i]);
  }

  const Backward& p_;
  const Normals<R>& normals_;
  const int period_, width_;
  const int64_t chunk_, total_;
  std::unique_ptr<double[]> parts_;  // [chunks, 2, period]
};

template <class R>
class BackwardJob {
 public:
  explicit BackwardJob(const Backward& call)
      : p_(call),
        m_(matrix_of(call)),
        tile_(tile_of(m_)),
        chunk_(chunk_size(call.K) / tile_ * tile_),
        in_(call, m_),
        kl_used_(call.has_kl && (call.grad_kl || call.grad_kl_per_group)),
        mode_(!kl_used_ ? Mode::sample : (call.prior_mu.data ? Mode::prior : Mode::standard)),
        draws_(call.has_z && call.K == 1),
        repeated_(call.has_z && is_repeated(call)),
        tiles_(backward_tiles<R>(call, mode_, draws_)),
        bounds_(bounds_of<R>(call)),
        weight_(static_cast<const R*>(call.weight)),
        grad_kl_(static_cast<const R*>(call.grad_kl)),
        grad_mu_(call.grad_mu, call, m_),
        grad_scale_(call.grad_scale, call, m_),
        grad_prior_mu_(call.grad_prior_mu, call, m_),
        grad_prior_scale_(call.grad_prior_scale, call, m_),
        width_(std::min(in_.width(),
                        width_of<R>({&grad_mu_, &grad_scale_, &grad_prior_mu_, &grad_prior_scale_}))) {
    if (call.has_z) normals_.emplace_back(call, call.numel());
    if (kl_used_ && call.numel() > 0) prepare_groups();
  }

  void operator()(Parallel parallel) {
    if (p_.numel() == 0) return;
    if (repeated_) {
      sums_.resize(2 * kTile);
      RepeatedSums<R>(p_, normals_[0])(parallel, sums_.data(), sums_.data() + kTile);
    }
    const int64_t samples = repeated_ ? 1 : std::max<int64_t>(p_.K, 1);
    run_chunks(*this, (p_.numel() + chunk_ - 1) / chunk_, std::min(p_.numel(), chunk_) * samples, parallel);
  }

  void run(int64_t begin, int64_t end) {
    State state;
    if (!p_.has_z) {
      std::fill_n(state.sum, kTile, R(0));
      std::fill_n(state.noise, kTile, R(0));
    }
    const int64_t stop = std::min(p_.numel(), end * chunk_);
    for (int64_t i = begin * chunk_; i < stop; i += tile_)
      tile(i, static_cast<int>(std::min<int64_t>(tile_, stop - i)), state);
  }

 private:
  struct State {
    TileBuffers<R> tile;
    typename Normals<R>::Buffer normals;
    R sum[kTile], noise[kTile], c[kTile], grad_z[kTile];  // sum and noise are zero unless written
    R grad_mu[kTile], grad_scale[kTile], grad_prior_mu[kTile], grad_prior_scale[kTile];
    uint8_t open[kTile];
    int filled = 0;  // this many elements of c, from the first on, are the same number
  };

  // The part of c, the gradient with respect to KL[b, g] over w_b, that is the same for all batch rows; and
  // the factor of the part that is not.
  void prepare_groups() {
    const R* gate = static_cast<const R*>(p_.gate);
    const R* grad_rate = static_cast<const R*>(p_.grad_kl_per_group);
    const R inverse = std::abs(gate[0]);
    const bool scalar = p_.reduction != Reduction::none && p_.reduction != Reduction::elementwise;
    double product = 0;  // one rounding for all of it, since every gradient carries it
    if (grad_kl_ && scalar) {
      product = static_cast<double>(grad_kl_[0]);
      if (p_.reduction != Reduction::sum) product *= static_cast<double>(inverse);
      if (p_.reduction == Reduction::mean) product /= static_cast<double>(p_.row_size());
    }
    const R gain = static_cast<R>(product);
    by_row_ = grad_kl_ && (p_.reduction == Reduction::none || (scalar && p_.clamp == Clamp::sample));
    row_gain_ = gain;
    // Loops without a branch inside, so that they are vectorised.
    shared_.assign(static_cast<size_t>(p_.G), R(0));
    R* const shared = shared_.data();
    if (grad_rate) {
      const R factor = p_.group_sums ? R(1) : inverse;
      for (int64_t g = 0; g < p_.G; ++g) shared[g] = grad_rate[g] * factor;
    }
    if (grad_kl_ && scalar && !by_row_) {
      if (p_.clamp == Clamp::batch)
        for (int64_t g = 0; g < p_.G; ++g) shared[g] = std::signbit(gate[g]) ? shared[g] : shared[g] + gain;
      else
        for (int64_t g = 0; g < p_.G; ++g) shared[g] += gain;
    }
    // Repeated for a tile that begins with any of them, so that they are read in place.
    if (m_.kind != Matrix::Kind::cells && p_.G < tile_ && p_.numel() >= kTile) {
      const int64_t size = tile_ + p_.G;
      shared_.resize(static_cast<size_t>(size));
      for (int64_t n = p_.G; n < size; n *= 2)
        std::copy_n(shared_.begin(), std::min(n, size - n), shared_.begin() + n);
    }
  }

  bool open(int64_t b, int64_t g) const {
    if (p_.clamp != Clamp::sample) return true;
    const int64_t cell = b * p_.G + g;
    return (p_.open[cell / 8] >> (cell % 8) & 1) != 0;
  }

  // What the gradient of a cell of row b has beside `shared_`, if the cell is open.
  R gain_of(int64_t b) const {
    return !by_row_ ? R(0) : (p_.reduction == Reduction::none ? grad_kl_[b] : row_gain_);
  }

  R coefficient(int64_t b, int64_t g) const {
    R c = shared_[static_cast<size_t>(g)];
    if (by_row_ && open(b, g)) c += gain_of(b);
    return weight_ ? weight_[b] * c : c;
  }

  // c of a tile: in `s.c`, or where it is in memory already.
  const R* coefficients(int64_t begin, int n, State& s) const {
    R* const c = s.c;
    if (m_.kind == Matrix::Kind::cells && p_.reduction != Reduction::elementwise &&
        begin % m_.cols + n <= m_.cols) {
      const int64_t row = begin / m_.cols;
      const R same = coefficient(row / m_.inner, row % m_.inner);
      // All tiles of a long row have the same number, so that most find it there already.
      if (s.filled < n || std::memcmp(c, &same, sizeof(R)) != 0) std::fill_n(c, n, same);
      s.filled = n;
      return c;
    }
    s.filled = 0;
    const bool plain = !by_row_ && !weight_;
    if (plain && m_.kind != Matrix::Kind::cells && p_.reduction != Reduction::elementwise) {
      const int64_t col = begin % m_.cols;
      if (col + padded(n) <= static_cast<int64_t>(shared_.size())) return shared_.data() + col;
    }
    const bool gated = by_row_ && p_.clamp == Clamp::sample && m_.kind != Matrix::Kind::cells;
    if (gated && m_.kind == Matrix::Kind::columns) unpack_bits(p_.open, begin, n, s.open);
    for_segments(m_, begin, n, [&](int64_t row, int64_t col, int at, int len) {
      const int64_t b = m_.inner == 1 ? row : row / m_.inner;
      const R* const shared = shared_.data() + col;
      if (m_.kind == Matrix::Kind::cells) {
        std::fill_n(c + at, len, coefficient(b, row % m_.inner));
      } else if (plain) {
        std::copy_n(shared, len, c + at);
      } else {
        if (gated && m_.kind == Matrix::Kind::strips) unpack_bits(p_.open, b * p_.G + col, len, s.open + at);
        const R w = weight_ ? weight_[b] : R(1);
        const uint8_t* const open = gated ? s.open + at : nullptr;
        if (len < kBlock)
          short_row_coefficients(shared, open, gain_of(b), w, c + at, len);
        else
          row_coefficients(shared, open, gain_of(b), w, c + at, len);
      }
    });
    if (grad_kl_ && p_.reduction == Reduction::elementwise)
      for (int i = 0; i < n; ++i) c[i] += grad_kl_[begin + i];
    return c;
  }

  void tile(int64_t begin, int n, State& s) {
    const TileShape shape = shape_of(n, width_);
    const TileInputs<R> in = in_.read(begin, n, shape.width, mode_ == Mode::prior, s.tile);
    const R *sum = s.sum, *noise = s.noise;
    if (draws_) {
      sum = read_grad_z(p_, begin, n, std::max(n, kLanes), s.grad_z);
      noise = normals_[0](0, begin, n, s.normals);
    } else if (repeated_) {
      sum = sums_.data();
      noise = sum + kTile;
    } else if (p_.has_z) {
      std::fill_n(s.sum, kTile, R(0));
      std::fill_n(s.noise, kTile, R(0));
      const int whole = n / kLanes * kLanes;  // of these none has to be copied
      for (int64_t k = 0; k < p_.K; ++k) {
        const int64_t at = k * p_.numel() + begin;
        const R* eps = normals_[0](k, begin, n, s.normals);
        if (whole > 0)
          add_noise_tile(read_grad_z(p_, at, whole, whole, s.grad_z), eps, s.sum, s.noise, whole);
        if (whole < n)
          add_noise_tile(read_grad_z(p_, at + whole, n - whole, kLanes, s.grad_z), eps + whole, s.sum + whole,
                         s.noise + whole, kLanes);
      }
    }
    const R* c = kl_used_ ? coefficients(begin, n, s) : s.c;
    const View<R>* views[] = {&grad_mu_, &grad_scale_, &grad_prior_mu_, &grad_prior_scale_};
    R* buffers[] = {s.grad_mu, s.grad_scale, s.grad_prior_mu, s.grad_prior_scale};
    Rows<R> to[4];
    for (int i = 0; i < 4; ++i) {
      if (*views[i]) to[i] = views[i]->direct(begin, n, shape.width);
      if (!to[i].at) to[i] = {buffers[i], shape.width};
    }
    const TileGradients<R> out{to[0], to[1], to[2], to[3]};
    run_tile(tiles_, shape, [&](auto tile, int from, TileShape part) {
      const auto run = [&](const TileInputs<R>& from_in, const TileGradients<R>& from_out) {
        return tile(from_in, bounds_, sum + from, noise + from, c + from, p_.has_z,
                    static_cast<R>(p_.posterior_share), static_cast<R>(p_.prior_share), from_out, part);
      };
      return from == 0 ? run(in, out) : run(in.from(from), out.from(from));
    });
    for (int i = 0; i < 4; ++i)
      if (*views[i] && to[i].at == buffers[i]) views[i]->write(begin, n, buffers[i]);
  }

  const Backward& p_;
  const Matrix m_;
  const int tile_;       // elements of a tile
  const int64_t chunk_;  // elements of a chunk
  const Inputs<R> in_;
  const bool kl_used_;
  const Mode mode_;
  const bool draws_;     // in the tile's own loop
  const bool repeated_;  // the sums over samples come before the only tile
  const Tiles<BackwardTile<R>> tiles_;
  const Bounds<R> bounds_;
  const R* weight_;
  const R* grad_kl_;
  const View<R> grad_mu_, grad_scale_, grad_prior_mu_, grad_prior_scale_;
  const int width_;  // of a tile's rows
  std::vector<Normals<R>> normals_;
  bool by_row_ = false;
  R row_gain_ = 0;
  std::vector<R> shared_;
  std::vector<R> sums_;  // of repeated samples: of grad_z, then of grad_z eps
};

}  // namespace

void backward(const Backward& call, Parallel parallel) {
  if (call.dtype == DType::f64)
    BackwardJob<double>{call}(parallel);
  else
    BackwardJob<float>{call}(parallel);
}

}  // namespace vk::cpu
