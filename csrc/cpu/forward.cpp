#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "../text.h"
#include "job.h"

namespace vk::cpu {
namespace {

// float sums are added to double ones after this many additions, which keeps their error close to one
// rounding.
constexpr int kRowsPerFlush = 64;

template <class R>
using ForwardTile = bool (*)(const TileInputs<R>&, Bounds<R>, const R*, Rows<R>, R*, TileShape);
template <class R>
Tiles<ForwardTile<R>> forward_tiles(const Problem& problem, Mode mode, bool draw) {
  return tiles_for<R, ForwardTile<R>>(problem, mode, draw, [](auto p, auto m, auto d, auto loop) {
    return forward_tile<p.value, m.value, d.value, loop.value, R>;
  });
}

// NaN fails the comparison as well.
template <class R>
void check_not_negative(const char* name, const void* data, int64_t n) {
  const R* x = static_cast<const R*>(data);
  bool all = true;
  for (int64_t i = 0; i < n; ++i) all &= x[i] >= R(0);  // without a branch, so that it is vectorised
  for (int64_t i = 0; !all && i < n; ++i)
    if (!(x[i] >= R(0)))
      throw std::invalid_argument(std::string(name) + " must be non-negative and not NaN, got " +
                                  repr(static_cast<double>(x[i])) + " at index " + std::to_string(i) +
                                  "; correct it, e.g. with " + name + ".clamp(min=0)");
}

// Draws K samples of a few elements, whose means and standard deviations are `period` numbers.
template <class R>
class RepeatedSamples {
 public:
  RepeatedSamples(const Forward& call, const Normals<R>& normals)
      : p_(call), normals_(normals), period_(static_cast<int>(call.numel())), total_(call.K * period_) {}

  // To be called first.
  void take(const R* mu, const R* sd) {
    const int whole = kTile + period_;
    for (int i = 0; i < whole; ++i) {
      mu_[i] = mu[i % period_];
      sd_[i] = sd[i % period_];
    }
  }

  void operator()(Parallel parallel) {
    run_chunks(*this, (total_ + kChunk - 1) / kChunk, std::min(total_, kChunk), parallel);
  }

  void run(int64_t begin, int64_t end) const {
    typename Normals<R>::Buffer buffer;
    R sampled[kTile];
    const int64_t stop = std::min(total_, end * kChunk);
    for (int64_t i = begin * kChunk; i < stop; i += kTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTile, stop - i));
      const int phase = static_cast<int>(i % period_);
      const R* eps = normals_(0, i, n, buffer);
      as_type<R>(p_.dtype, [&](auto zero) {
        auto* to = static_cast<decltype(zero)*>(p_.z) + i;
        if constexpr (std::is_same_v<decltype(zero), R>) {
          if (n >= kLanes) return sample_tile(mu_ + phase, sd_ + phase, eps, to, n);
        }
        sample_tile(mu_ + phase, sd_ + phase, eps, sampled, padded(n));
        store_rows(static_cast<const R*>(sampled), to, 0, 1, n);
      });
    }
  }

 private:
  const Forward& p_;
  const Normals<R>& normals_;
  const int period_;
  const int64_t total_;
  R mu_[2 * kTile], sd_[2 * kTile];  // the numbers over and over, for a tile that begins with any of them
};

template <class R>
class ForwardJob {
 public:
  explicit ForwardJob(const Forward& call)
      : p_(call),
        m_(matrix_of(call)),
        chunks_(chunks_of(m_, call.clamp == Clamp::sample, call.K)),
        in_(call, m_),
        mode_(!call.has_kl ? Mode::sample : (call.prior_mu.data ? Mode::prior : Mode::standard)),
        draws_(call.z != nullptr && call.K == 1),
        // Samples are drawn from rows that lie one behind the other.
        width_(call.z != nullptr && call.K != 1 ? kTile : in_.width()),
        tiles_(forward_tiles<R>(call, mode_, draws_)),
        bounds_(bounds_of<R>(call)),
        weight_(static_cast<const R*>(call.weight)),
        lambda_(static_cast<const R*>(call.free_bits_per_group)),
        row_values_wanted_(call.has_kl && (call.clamp == Clamp::sample || call.reduction == Reduction::none)),
        folded_(m_.kind == Matrix::Kind::columns && !row_values_wanted_ && call.weight == nullptr &&
                m_.cols > 0 && m_.cols < kTile && kTile % m_.cols == 0),
        short_rows_(m_.kind != Matrix::Kind::strips && m_.cols > 0 && m_.cols <= kLanes &&
                    tile_of(m_) % m_.cols == 0) {
    if (call.z != nullptr) {
      normals_.emplace_back(call, call.numel());
      z_ = View<R>(call.z, call.dense(), call, m_);
      if (is_repeated(call)) repeated_.emplace(call, normals_[0]);
    }
  }

  void operator()(Parallel parallel) {
    if (p_.has_kl) {
      if (weight_) check_not_negative<R>("weight", weight_, p_.B);
      if (lambda_) check_not_negative<R>("free_bits", lambda_, p_.G);
      if (m_.kind == Matrix::Kind::columns) {
        sums_.reset(new double[static_cast<size_t>(std::max<int64_t>(chunks_.down(), 1) * p_.G)]);
        if (row_values_wanted_) row_values_.reset(new double[static_cast<size_t>(p_.B * chunks_.across)]);
      } else {
        const size_t cells = static_cast<size_t>(parts() * p_.cells());
        cells_.reset(new R[cells]);
        if (p_.numel() == 0)
          std::fill_n(cells_.get(), cells, R(0));  // sums of nothing, which no chunk writes
      }
    }
    if (p_.numel() > 0) {
      const int64_t count = chunks_.count();
      const int64_t samples = repeated_ ? 1 : std::max<int64_t>(p_.K, 1);
      run_chunks(*this, count, p_.numel() / std::max<int64_t>(count, 1) * samples, parallel);
    }
    if (repeated_) (*repeated_)(parallel);
    if (p_.has_kl) finish();
  }

  void run(int64_t begin, int64_t end) {
    State state;
    std::fill_n(state.tile.kl, kTile + kLanes, R(0));
    if (p_.has_kl && m_.kind != Matrix::Kind::cells) {
      state.width = static_cast<int>(folded_ ? std::min<int64_t>(kTile, p_.numel()) : chunks_.col_step);
      state.sum.resize(static_cast<size_t>(state.width));
      if (folded_ || m_.kind == Matrix::Kind::strips) {
        state.totals.resize(state.sum.size());
        state.total = state.totals.data();
      }
    }
    for (int64_t i = begin; i < end; ++i) chunk(i, state);
  }

 private:
  struct State {
    TileBuffers<R> tile;
    typename Normals<R>::Buffer normals;
    R sampled[kTile], value[kTile], lambda[kTile];
    uint8_t open[kTile];
    int width = 0;               // how many columns are added up
    std::vector<R> sum;          // of each, over at most kRowsPerFlush rows
    std::vector<double> totals;  // the same over all rows, where these are not the results
    double* total = nullptr;     // the same, in `totals` or in the results
    int rows = 0;                // in `sum`
    double row_sum = 0;          // of the current matrix row, as far as it was read
  };

  // How many chunks a cell's sum is spread over.
  int64_t parts() const { return m_.kind == Matrix::Kind::cells ? chunks_.across : chunks_.per_unit; }

  void chunk(int64_t index, State& state) {
    const Chunk c = chunks_[index];
    const bool columns = p_.has_kl && m_.kind == Matrix::Kind::columns;
    double* const sums =
        columns ? &sums_[static_cast<size_t>(index / chunks_.across * p_.G + c.col0)] : nullptr;
    if (columns) {
      std::fill_n(sums, c.col1 - c.col0, 0.0);
      if (!folded_) {
        state.width = static_cast<int>(c.col1 - c.col0);
        state.total = sums;
      }
    }
    for_tiles(m_, c, [&](int64_t begin, int n) {
      const TileShape shape = shape_of(n, width_);
      const TileInputs<R> in = in_.read(begin, n, shape.width, mode_ == Mode::prior, state.tile);
      Rows<R> z{state.tile.z, shape.width};
      const R* eps = state.normals.eps;  // not read where nothing is drawn
      if (draws_) {
        eps = normals_[0](0, begin, n, state.normals);
        if (const Rows<R> direct = z_.direct(begin, n, shape.width); direct.at) z = direct;
      }
      run_tile(tiles_, shape, [&](auto tile, int from, TileShape part) {
        const auto run = [&](const TileInputs<R>& from_in) {
          return tile(from_in, bounds_, eps + from, z.from(from), state.tile.kl + from, part);
        };
        return from == 0 ? run(in) : run(in.from(from));
      });
      if (draws_ && z.at == state.tile.z) z_.write(begin, n, z.at);
      if (repeated_)
        repeated_->take(in.mu.at, static_cast<const R*>(state.tile.z));  // of the only tile
      else if (!draws_ && z_)
        sample(in.mu.at, begin, n, state);
      if (p_.has_kl) reduce(c, index, begin, n, state);
    });
    if (!columns) return;
    flush_columns(state);
    if (folded_) {
      for (int j = 0; j < state.width; j += static_cast<int>(m_.cols))
        for (int64_t i = 0; i < m_.cols; ++i) sums[i] += state.total[j + i];
      std::fill_n(state.total, state.width, 0.0);
    }
  }

  void sample(const R* mu, int64_t begin, int n, State& state) {
    for (int64_t k = 0; k < p_.K; ++k) {
      const R* eps = normals_[0](k, begin, n, state.normals);
      const View<R> z = z_.block(k * p_.numel());
      R* direct = z.direct(begin, n, std::max(n, kLanes)).at;
      R* to = direct ? direct : state.sampled;
      sample_tile(mu, static_cast<const R*>(state.tile.z), eps, to, std::max(n, kLanes));
      if (!direct) z.write(begin, n, to);
    }
  }

  void reduce(const Chunk& c, int64_t index, int64_t begin, int n, State& state) {
    const R* kl = state.tile.kl;
    if (p_.reduction == Reduction::elementwise) std::copy_n(kl, n, static_cast<R*>(p_.kl) + begin);
    if (folded_) {
      add_columns(kl, R(1), 0, n, state);
      if (++state.rows == kRowsPerFlush) flush_columns(state);
    } else if (short_rows_) {
      const int width = static_cast<int>(m_.cols);
      const int64_t row = begin / width;
      if (m_.kind == Matrix::Kind::cells) {
        sum_rows(kl, n / width, width, &cells_[static_cast<size_t>(row)]);
        return;
      }
      const R* value = p_.clamp == Clamp::sample ? clamp_cells(begin, n, state) : kl;
      if (row_values_wanted_) sum_rows(value, n / width, width, &row_values_[static_cast<size_t>(row)]);
      add_short_rows(kl, n / width, weight_ ? weight_ + row : nullptr, state);
    } else if (m_.kind == Matrix::Kind::columns) {
      const R* value = kl;
      if (p_.clamp == Clamp::sample) value = clamp_cells(begin, n, state);
      for_segments(m_, begin, n, [&](int64_t row, int64_t col, int at, int len) {
        add_columns(kl + at, weight_ ? weight_[row] : R(1), col - c.col0, len, state);
        if (row_values_wanted_) {
          const double part = static_cast<double>(sum_of(value + at, len));
          double& out = row_values_[static_cast<size_t>(row * chunks_.across + index % chunks_.across)];
          out = col == c.col0 ? part : out + part;
        }
        if (col + len == c.col1 && ++state.rows == kRowsPerFlush) flush_columns(state);
      });
    } else if (m_.kind == Matrix::Kind::strips) {
      for_segments(m_, begin, n, [&](int64_t row, int64_t col, int at, int len) {
        add_columns(kl + at, R(1), col, len, state);
        if (col + len < m_.cols) return;
        if (++state.rows == kRowsPerFlush) flush_columns(state);
        if ((row + 1) % m_.inner == 0 || row + 1 == c.row1) {  // the batch row's, or the chunk's, last row
          flush_columns(state);
          const int64_t part = index / chunks_.across % chunks_.per_unit;
          R* out = &cells_[static_cast<size_t>(part * p_.cells() + row / m_.inner * p_.G)];
          for (int64_t g = 0; g < p_.G; ++g) {
            out[g] = static_cast<R>(state.total[g]);
            state.total[g] = 0;
          }
        }
      });
    } else {
      for_segments(m_, begin, n, [&](int64_t row, int64_t col, int at, int len) {
        if (col == c.col0) state.row_sum = 0;
        state.row_sum += static_cast<double>(sum_of(kl + at, len));
        if (col + len == c.col1)
          cells_[static_cast<size_t>(index % chunks_.across * p_.cells() + row)] =
              static_cast<R>(state.row_sum);
      });
    }
  }

  void add_columns(const R* kl, R w, int64_t col, int len, State& state) {
    R* sum = &state.sum[static_cast<size_t>(col)];
    if (len >= 16) {
      add_scaled(kl, w, sum, len);
    } else {
      for (int i = 0; i < len; ++i) sum[i] += w * kl[i];
    }
  }

  // A call for each of them took a quarter of the forward of rows of 10.
  void add_short_rows(const R* kl, int rows, const R* weight, State& state) {
    const int width = static_cast<int>(m_.cols);
    while (rows > 0) {
      const int some = std::min(rows, kRowsPerFlush - state.rows);
      if (weight) {
        add_weighted_rows(kl, weight, some, width, state.sum.data());
        weight += some;
      } else {
        add_rows(kl, some, width, state.sum.data());
      }
      kl += some * width;
      rows -= some;
      state.rows += some;
      if (state.rows == kRowsPerFlush) flush_columns(state);
    }
  }

  void flush_columns(State& state) {
    flush(state.sum.data(), state.total, state.width);
    state.rows = 0;
  }

  // Free bits on each element, where an element is a cell; returns the clamped values.
  const R* clamp_cells(int64_t begin, int n, State& state) {
    if (lambda_) {
      for_segments(m_, begin, n, [&](int64_t, int64_t col, int at, int len) {
        std::copy_n(lambda_ + col, len, state.lambda + at);
      });
    } else {
      std::fill_n(state.lambda, kTile, static_cast<R>(p_.free_bits));
    }
    clamp_tile(static_cast<const R*>(state.tile.kl), static_cast<const R*>(state.lambda), p_.penalty,
               state.value, state.open, padded(n));
    pack_bits(state.open, begin, n, p_.open);
    return state.value;
  }

  R lambda(int64_t g) const { return lambda_ ? lambda_[g] : static_cast<R>(p_.free_bits); }

  // From the chunks' sums to the results, in a fixed order.
  void finish() {
    double total_weight = static_cast<double>(p_.B);
    if (weight_) {
      total_weight = 0;
      for (int64_t b = 0; b < p_.B; ++b) total_weight += static_cast<double>(weight_[b]);
    }
    if (m_.kind == Matrix::Kind::columns) {
      if (p_.numel() == 0) std::fill_n(sums_.get(), p_.G, 0.0);  // of no chunk
      for (int64_t d = 1; p_.numel() > 0 && d < chunks_.down(); ++d)
        for (int64_t g = 0; g < p_.G; ++g)
          sums_[static_cast<size_t>(g)] += sums_[static_cast<size_t>(d * p_.G + g)];
      for (int64_t b = 0; row_values_wanted_ && b < p_.B; ++b) {
        double value = 0;
        for (int64_t part = 0; p_.numel() > 0 && part < chunks_.across; ++part)
          value += row_values_[static_cast<size_t>(b * chunks_.across + part)];
        row_values_[static_cast<size_t>(b)] = value;
      }
    } else {
      finish_cells();
    }

    R* rate = static_cast<R*>(p_.kl_per_group);
    rates_of(static_cast<const double*>(sums_.get()), p_.group_sums ? 1.0 : total_weight, rate, p_.G);
    R* gate = static_cast<R*>(p_.gate);
    const R inverse = static_cast<R>(1.0 / total_weight);
    double clamped = 0;
    if (p_.clamp == Clamp::batch)
      clamped = clamp_groups(static_cast<const R*>(rate), lambda_, static_cast<R>(p_.free_bits), p_.penalty,
                             inverse, gate, p_.G);
    else
      gate[0] = inverse;

    R* kl = static_cast<R*>(p_.kl);
    if (p_.reduction == Reduction::elementwise) return;
    if (p_.reduction == Reduction::none) {
      for (int64_t b = 0; b < p_.B; ++b) kl[b] = static_cast<R>(row_values_[static_cast<size_t>(b)]);
      return;
    }
    double sum = 0;  // of the weighted rows
    if (p_.clamp == Clamp::batch && total_weight != 0) {
      sum = clamped * total_weight;
    } else if (p_.clamp == Clamp::sample) {
      for (int64_t b = 0; b < p_.B; ++b)
        sum += (weight_ ? static_cast<double>(weight_[b]) : 1.0) * row_values_[static_cast<size_t>(b)];
    } else {
      // Without any weight the clamp has no mean to clamp: 0, or the NaN of a row that is not finite.
      sum = sum_of(static_cast<const double*>(sums_.get()), p_.G);
    }
    if (p_.reduction != Reduction::sum)
      sum = p_.clamp == Clamp::batch && total_weight != 0 ? clamped : sum / total_weight;
    if (p_.reduction == Reduction::mean) sum /= static_cast<double>(p_.row_size());
    kl[0] = static_cast<R>(sum);
  }

  void finish_cells() {
    sums_.reset(new double[static_cast<size_t>(p_.G)]());
    if (row_values_wanted_) row_values_.reset(new double[static_cast<size_t>(p_.B)]);
    std::vector<uint8_t> open(8, 0);
    for (int64_t b = 0; b < p_.B; ++b) {
      const double w = weight_ ? static_cast<double>(weight_[b]) : 1.0;
      R* const cells = &cells_[static_cast<size_t>(b * p_.G)];
      for (int64_t g = 0; parts() > 1 && g < p_.G; ++g) {
        double whole = 0;
        for (int64_t part = 0; part < parts(); ++part)
          whole += static_cast<double>(cells[part * p_.cells() + g]);
        cells[g] = static_cast<R>(whole);
      }
      for (int64_t g = 0; g < p_.G; ++g) sums_[static_cast<size_t>(g)] += w * static_cast<double>(cells[g]);
      if (!row_values_wanted_) continue;
      double row = 0;
      for (int64_t g = 0; g < p_.G; ++g) {
        const int64_t cell = b * p_.G + g;
        R kl = cells[g];
        if (p_.clamp == Clamp::sample) {
          open[static_cast<size_t>(cell % 8)] = kl >= lambda(g) ? 1 : 0;
          if (cell % 8 == 7 || cell + 1 == p_.cells())
            pack_bits(open.data(), cell / 8 * 8, static_cast<int>(cell % 8) + 1, p_.open);
          kl = clamp_value(kl, lambda(g), p_.penalty);
        }
        row += static_cast<double>(kl);
      }
      row_values_[static_cast<size_t>(b)] = row;
    }
  }

  const Forward& p_;
  const Matrix m_;
  const Chunks chunks_;
  const Inputs<R> in_;
  const Mode mode_;
  const bool draws_;  // in the tile's own loop
  const int width_;   // of a tile's rows
  const Tiles<ForwardTile<R>> tiles_;
  const Bounds<R> bounds_;
  const R* weight_;
  const R* lambda_;
  const bool row_values_wanted_;
  const bool folded_;      // whole rows fit a tile exactly: tiles are added as they are and folded at the end
  const bool short_rows_;  // tiles are whole rows of at most kLanes: these are added by one call
  std::vector<Normals<R>> normals_;  // one, where z is wanted
  View<R> z_;                        // of the first sample
  std::optional<RepeatedSamples<R>> repeated_;
  std::unique_ptr<double[]> sums_;        // [chunks, G]; in the end the first row has the groups' sums
  std::unique_ptr<double[]> row_values_;  // [B, chunks side by side]; in the end the first B have the rows'
  std::unique_ptr<R[]> cells_;
};

}  // namespace

void forward(const Forward& call, Parallel parallel) {
  if (call.dtype == DType::f64)
    ForwardJob<double>{call}(parallel);
  else
    ForwardJob<float>{call}(parallel);
}

void philox_words(uint64_t seed, uint64_t offset, uint64_t first_quad, int64_t n, int64_t* words) {
  const PhiloxKeys keys = philox_keys(seed, offset);
  const Generator& generator = best_generator();
  for (int64_t i = 0; i < n; i += 4 * kQuadLanes) {
    Words x[kQuadLanes];
    generator.words(keys, first_quad + static_cast<uint64_t>(i / 4), kQuadLanes, x);
    for (int64_t j = 0; j < 4 * kQuadLanes && i + j < n; ++j) {
      const Words& w = x[j / 4];
      const uint32_t four[4] = {w.x0, w.x1, w.x2, w.x3};
      words[i + j] = static_cast<int64_t>(four[j % 4]);
    }
  }
}

const char* isa() {
  const Isa isa = best_isa();
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace vk::cpu
