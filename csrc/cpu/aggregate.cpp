// The aggregate posterior on the CPU.
//
// The posteriors are brought into tiles of kWidth, one dimension behind the other, so that the inner loops
// run over neighbours in memory whatever D is. Sums over posteriors are kept in kLane parts, sums over
// samples one for each posterior; which parts there are depends on the shape alone, never on the number of
// threads or the width of a vector.
#include "aggregate.h"

#include <cstring>
#include <memory>
#include <new>

#include "job.h"

namespace vk::cpu {
namespace {

constexpr int kWidth = 256;  // posteriors of a tile: its three numbers for one dimension are 3 KB
constexpr int kRows = 8;     // samples that meet a tile together
constexpr int kLane = 16;
constexpr int kDims = 16;  // dimensions whose densities are added up before they meet the sum of the others

template <class R>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n)
      : data_(static_cast<R*>(::operator new(static_cast<size_t>(n) * sizeof(R), std::align_val_t(64)))) {}
  R* get() const { return data_.get(); }
  R* operator+(int64_t i) const { return data_.get() + i; }

 private:
  struct Free {
    void operator()(R* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<R, Free> data_;
};

template <class R>
using Lanes = R[kLane];

// The posteriors of a tile in one dimension.
template <class R>
struct Dimension {
  R mu[kWidth], root[kWidth], peak[kWidth];
};
template <class R>
struct DimensionSums {
  R weight[kWidth], pull[kWidth], spread[kWidth];
};
template <class R>
struct PowersInLanes {
  Lanes<R> top, sum;
};

// ---- loops -----------------------------------------------------------------------------------------------

// Calls body(j, lane) for j in [0, n), n a multiple of kLane.
template <class Body>
VK_FN void in_lanes(int n, const Body& body) {
  const int whole = n & -kLane;
  for (int j = 0; j < whole; j += kLane)
#pragma GCC ivdep
    for (int lane = 0; lane < kLane; ++lane) body(j + lane, lane);
}

// The largest of t and of what is there already, in each lane. Written with a vector's type: as a loop over
// an array GCC makes it 16 scalars, which took a third of the forward's time.
template <class R>
VK_FN void raise(const R* t, R (&top)[kLane], int n) {
  typedef R Vector __attribute__((vector_size(VK_X86_DISPATCH ? 32 : 16)));
  constexpr int kElements = sizeof(Vector) / sizeof(R), kVectors = kLane / kElements;
  Vector most[kVectors];
  std::memcpy(most, top, sizeof(top));
  for (int j = 0; j < n; j += kLane) {
    Vector next[kVectors];
    std::memcpy(next, t + j, sizeof(next));
    for (int v = 0; v < kVectors; ++v) most[v] = next[v] > most[v] ? next[v] : most[v];
  }
  std::memcpy(top, most, sizeof(top));
}

template <class R>
VK_FN R lane_total(const R (&x)[kLane]) {
  Lanes<R> part;
  std::copy_n(x, kLane, part);
  for (int width = kLane / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

// Both are functions for the sake of `restrict`.
template <class R>
VK_FN void add_densities(const Dimension<R>& q, R z, R* __restrict sum, int n) {
  const int whole = n & -kLane;
#pragma GCC ivdep
#pragma GCC unroll 4
  for (int j = 0; j < whole; ++j) sum[j] += log2_density(z, {q.mu[j], q.root[j], q.peak[j]});
}
template <class R>
VK_FN void densities(const Dimension<R>& q, R z, R* __restrict t, R* __restrict sum, int n) {
  const int whole = n & -kLane;
#pragma GCC ivdep
#pragma GCC unroll 4
  for (int j = 0; j < whole; ++j) {
    t[j] = log2_density(z, {q.mu[j], q.root[j], q.peak[j]});
    sum[j] += t[j];
  }
}

template <class R>
VK_FN void add_powers(const R* __restrict t, PowersInLanes<R>& to, int n) {
  Lanes<R> top, sum;
  for (int l = 0; l < kLane; ++l) top[l] = to.top[l];
  raise(t, top, n);
  for (int l = 0; l < kLane; ++l) sum[l] = to.sum[l] * power_of_two(to.top[l] - top[l]);
  in_lanes(n, [&](int j, int l) VK_LAMBDA { sum[l] += power_of_two(t[j] - top[l]); });
  for (int l = 0; l < kLane; ++l) to.top[l] = top[l];
  for (int l = 0; l < kLane; ++l) to.sum[l] = sum[l];
}

// Where in a tile the posteriors lie whose weight differs; outside of [0, width) they are in another tile.
template <class R>
struct Weights {
  int64_t own, next;
  R own_weight, next_weight;

  VK_FN void add(R* t, int64_t width) const {
    if (own >= 0 && own < width) t[own] = with_weight(t[own], own_weight);
    if (next >= 0 && next < width) t[next] = with_weight(t[next], next_weight);
  }
};

template <class R>
struct Meeting {                   // of kRows samples at most and a tile of posteriors
  const Dimension<R>* posteriors;  // [D]
  int held, width;                 // how many there are; the multiple of kLane above
  int64_t D;
  int rows;
  const R* z;  // [rows, D]
  Weights<R> weights[kRows];
  bool weighted;
};

// The log-densities of all dimensions together, and what `each` makes of those of one.
template <class R, class Each>
VK_FN void all_densities(const Meeting<R>& a, R (*__restrict sum)[kWidth], const Each& each) {
  R part[kRows][kWidth];
  for (int r = 0; r < a.rows; ++r)
    for (int j = 0; j < a.width; ++j) sum[r][j] = j < a.held ? R(0) : -std::numeric_limits<R>::infinity();
  for (int64_t d0 = 0; d0 < a.D; d0 += kDims) {
    const int64_t d1 = std::min(a.D, d0 + kDims);
    for (int r = 0; r < a.rows; ++r)
      for (int j = 0; j < a.width; ++j) part[r][j] = R(0);
    for (int64_t d = d0; d < d1; ++d)
      for (int r = 0; r < a.rows; ++r) each(r, d, part[r]);
    for (int r = 0; r < a.rows; ++r)
      for (int j = 0; j < a.width; ++j) sum[r][j] += part[r][j];
  }
  if (a.weighted)
    for (int r = 0; r < a.rows; ++r) a.weights[r].add(sum[r], a.width);
}

// `powers`: [rows, 1 + D], or [rows] where single dimensions are not wanted.
template <bool PerDim, class R>
VK_CLONES void forward_tile(const Meeting<R>& a, PowersInLanes<R>* powers) {
  alignas(64) R sum[kRows][kWidth];
  alignas(64) R t[kWidth];
  const int64_t columns = PerDim ? 1 + a.D : 1;
  all_densities(a, sum, [&](int r, int64_t d, R* part) VK_LAMBDA {
    const Dimension<R>& q = a.posteriors[d];
    const R z = a.z[r * a.D + d];
    if constexpr (PerDim) {
      densities(q, z, t, part, a.width);
      if (a.weighted) a.weights[r].add(t, a.width);
      add_powers(t, powers[r * columns + 1 + d], a.width);
    } else {
      add_densities(q, z, part, a.width);
    }
  });
  for (int r = 0; r < a.rows; ++r) add_powers(sum[r], powers[r * columns], a.width);
}

template <class R>
VK_CLONES void finish_powers(const PowersInLanes<R>* powers, int64_t n, R* top, R* sum) {
  for (int64_t i = 0; i < n; ++i) {
    const PowersInLanes<R>& p = powers[i];
    Lanes<R> scaled;
    R highest = p.top[0];
    for (int l = 1; l < kLane; ++l) highest = larger(highest, p.top[l]);
    for (int l = 0; l < kLane; ++l) scaled[l] = p.sum[l] * power_of_two(p.top[l] - highest);
    top[i] = highest;
    sum[i] = lane_total(scaled);
  }
}

template <class R>
struct Shares {              // of the gradients in the terms, and the largest terms
  const R *all, *all_top;    // [rows]; null: the gradient of log_qz is not used
  const R *dims, *dims_top;  // [rows, D]; null: that of log_qz_dims is not
};

// Adds to `sums` [D] and to `pulled` [rows, D].
template <bool All, bool Dims, class R>
VK_CLONES void backward_tile(const Meeting<R>& a, const Shares<R>& shares, DimensionSums<R>* sums,
                             R* pulled) {
  alignas(64) R w[kRows][kWidth];
  alignas(64) R t[kWidth];
  if constexpr (All) {
    all_densities(a, w, [&](int r, int64_t d, R* part) VK_LAMBDA {
      add_densities(a.posteriors[d], a.z[r * a.D + d], part, a.width);
    });
    for (int r = 0; r < a.rows; ++r) {
      const R share = shares.all[r], top = shares.all_top[r];
      R* __restrict row = w[r];
      in_lanes(a.width, [&](int j, int) VK_LAMBDA { row[j] = share * power_of_two(row[j] - top); });
    }
  }
  for (int64_t d = 0; d < a.D; ++d) {
    const Dimension<R>& q = a.posteriors[d];
    DimensionSums<R>& s = sums[d];
    for (int r = 0; r < a.rows; ++r) {
      const int64_t at = r * a.D + d;
      const R z = a.z[at];
      const R share = Dims ? shares.dims[at] : R(0), top = Dims ? shares.dims_top[at] : R(0);
      if constexpr (Dims) {
        in_lanes(a.width,
                 [&](int j, int) VK_LAMBDA { t[j] = log2_density(z, {q.mu[j], q.root[j], q.peak[j]}); });
        if (a.weighted) a.weights[r].add(t, a.width);
      }
      Lanes<R> pulls = {};
      in_lanes(a.width, [&](int j, int l) VK_LAMBDA {
        const R distance = z - q.mu[j];
        R weight = R(0);
        if constexpr (Dims) weight = share * power_of_two(t[j] - top);
        if constexpr (All) weight += w[r][j];
        const R pull = weight * distance * q.root[j];
        s.weight[j] += weight;
        s.pull[j] += pull;
        s.spread[j] += pull * distance;
        pulls[l] += pull * q.root[j];
      });
      pulled[at] += lane_total(pulls);
    }
  }
}

// ---- the posteriors --------------------------------------------------------------------------------------

// Arrays over the dimensions are padded to whole lanes, so that no scalar loop is left for the last ones.
inline size_t padded(int64_t D) { return static_cast<size_t>((D + kLane - 1) / kLane * kLane); }

template <Param P, class R>
VK_CLONES void components_of(const R* __restrict mu, const R* __restrict s, Bounds<R> bounds,
                             R* __restrict root, R* __restrict peak, int n) {
  in_lanes(n, [&](int i, int) VK_LAMBDA {
    const Component<R> c = component_of<P>(mu[i], s[i], bounds);
    root[i] = c.root;
    peak[i] = c.peak;
  });
}

template <Param P, class R>
VK_CLONES void gradients_of(const R* __restrict s, Bounds<R> bounds, const R* __restrict root,
                            R* __restrict weight, R* __restrict pull, const R* __restrict spread, int n) {
  in_lanes(n, [&](int i, int) VK_LAMBDA {
    const PosteriorGradients<R> g =
        posterior_gradients<P>(s[i], bounds, root[i], {weight[i], pull[i], spread[i]});
    pull[i] = g.mu;
    weight[i] = g.scale;
  });
}

template <class R>
VK_CLONES void add_to(const R* __restrict from, R* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// A matrix [rows, D] of one of the dtypes.
template <class R>
void read_rows(const Aggregate& p, const void* data, int64_t row, int rows, R* to) {
  as_type<R>(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(data) + (row + r) * p.D;
      for (int64_t d = 0; d < p.D; ++d) to[r * p.D + d] = widen(from[d]);
    }
  });
}
template <class R>
void write_rows(const Aggregate& p, const R* from, int64_t row, int rows, void* data) {
  as_type<R>(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int r = 0; r < rows; ++r) {
      T* to = static_cast<T*>(data) + (row + r) * p.D;
      for (int64_t d = 0; d < p.D; ++d) narrow(from[r * p.D + d], to[d]);
    }
  });
}

template <class R>
class Job {
 public:
  explicit Job(const Aggregate& call)
      : p_(call),
        tiles_((call.M + kWidth - 1) / kWidth),
        posteriors_(tiles_ * call.D),
        bounds_{static_cast<R>(0.5 * call.lo), static_cast<R>(0.5 * call.hi)},
        total_(call.M) {}

 protected:
  // Runs f(begin, end) over parts of [0, count).
  template <class F>
  static void run(Parallel parallel, int64_t count, int64_t elements, const F& f) {
    parallel(
        count, elements,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&f));
  }

  int width(int64_t tile) const {
    const int64_t left = std::min<int64_t>(kWidth, p_.M - tile * kWidth);
    return static_cast<int>((left + kLane - 1) / kLane * kLane);
  }
  int held(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kWidth, p_.M - tile * kWidth)); }
  const Dimension<R>* posteriors(int64_t tile) const { return posteriors_ + tile * p_.D; }

  void prepare(Parallel parallel) {
    run(parallel, tiles_, kWidth * p_.D, [&](int64_t begin, int64_t end) {
      const size_t all = padded(p_.D);
      std::vector<R> mu(all), s(all), root(all), peak(all);
      for (int64_t tile = begin; tile < end; ++tile) {
        Dimension<R>* to = posteriors_ + tile * p_.D;
        for (int j = 0; j < width(tile); ++j) {
          if (j < held(tile)) {
            read_rows(p_, p_.mu, tile * kWidth + j, 1, mu.data());
            read_rows(p_, p_.scale, tile * kWidth + j, 1, s.data());
            with_param(p_.param, [&](auto param) {
              components_of<param.value>(static_cast<const R*>(mu.data()), static_cast<const R*>(s.data()),
                                         bounds_, root.data(), peak.data(), static_cast<int>(all));
            });
          } else {
            const Component<R> none = no_component<R>();
            std::fill(mu.begin(), mu.end(), none.mu);
            std::fill(root.begin(), root.end(), none.root);
            std::fill(peak.begin(), peak.end(), none.peak);
          }
          for (int64_t d = 0; d < p_.D; ++d) {
            const size_t i = static_cast<size_t>(d);
            to[d].mu[j] = mu[i];
            to[d].root[j] = root[i];
            to[d].peak[j] = peak[i];
          }
        }
      }
    });
  }

  Meeting<R> meeting(int64_t row, int rows, const R* z, int64_t tile) const {
    Meeting<R> m{posteriors(tile), held(tile), width(tile), p_.D, rows, z, {}, p_.weighted()};
    for (int r = 0; r < rows; ++r) {
      const int64_t own = p_.first + row + r, next = own + 1 == total_ ? 0 : own + 1;
      m.weights[r] = {own - tile * kWidth, next - tile * kWidth, static_cast<R>(p_.own * kLog2E),
                      static_cast<R>(p_.next * kLog2E)};
    }
    return m;
  }

  const Aggregate& p_;
  const int64_t tiles_;
  Buffer<Dimension<R>> posteriors_;  // [tiles, D]
  const Bounds<R> bounds_;
  const int64_t total_;
};

template <class R>
class ForwardAggregate : Job<R> {
  using Job<R>::p_;

 public:
  explicit ForwardAggregate(const AggregateForward& call) : Job<R>(call), call_(call) {}

  void operator()(Parallel parallel) {
    this->prepare(parallel);
    const int64_t groups = (p_.N + kRows - 1) / kRows;
    this->run(parallel, groups, kRows * p_.M * std::max<int64_t>(p_.D, 1), [&](int64_t begin, int64_t end) {
      const int64_t columns = p_.columns();
      Buffer<R> z(kRows * p_.D);
      Buffer<PowersInLanes<R>> powers(kRows * columns);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t row = group * kRows;
        const int rows = static_cast<int>(std::min<int64_t>(kRows, p_.N - row));
        read_rows(p_, p_.z, row, rows, z.get());
        for (int64_t i = 0; i < rows * columns; ++i) {
          std::fill_n(powers.get()[i].top, kLane, no_powers<R>().top);
          std::fill_n(powers.get()[i].sum, kLane, no_powers<R>().sum);
        }
        for (int64_t tile = 0; tile < this->tiles_; ++tile) {
          const Meeting<R> m = this->meeting(row, rows, z.get(), tile);
          if (p_.per_dim)
            forward_tile<true>(m, powers.get());
          else
            forward_tile<false>(m, powers.get());
        }
        finish(row, rows, powers.get());
      }
    });
  }

 private:
  void finish(int64_t row, int rows, const PowersInLanes<R>* powers) const {
    const int64_t columns = p_.columns();
    R* top = static_cast<R*>(call_.saved) + row * columns;
    R* sum = top + p_.N * columns;
    finish_powers(powers, rows * columns, top, sum);
    const R base = static_cast<R>(p_.base);
    for (int r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const R log = log_of_powers<R>({top[r * columns + c], sum[r * columns + c]}, base);
        if (c == 0)
          static_cast<R*>(call_.log_qz)[row + r] = log;
        else
          static_cast<R*>(call_.log_qz_dims)[(row + r) * p_.D + c - 1] = log;
      }
    }
  }

  const AggregateForward& call_;
};

// Backward cuts the samples into slices and the tiles into blocks. A task has one of each and sums of its own
// for both, which are added up at the end. Numbers that the sums take in all, at most, unless there are few
// tasks already:
constexpr int64_t kSumsKept = int64_t{1} << 26;

template <class R>
class BackwardAggregate : Job<R> {
  using Job<R>::p_;
  using Job<R>::tiles_;

 public:
  explicit BackwardAggregate(const AggregateBackward& call) : Job<R>(call), call_(call) {
    groups_ = (p_.N + kRows - 1) / kRows;
    slices_ = std::clamp<int64_t>(groups_ / 4, 1, 8);
    blocks_ = std::clamp<int64_t>(tiles_, 1, 8);
    while (slices_ > 2 && slices_ * 3 * p_.M * p_.D > kSumsKept) slices_ /= 2;
    while (blocks_ > 4 && blocks_ * p_.N * p_.D > kSumsKept) blocks_ /= 2;
  }

  void operator()(Parallel parallel) {
    if (p_.D == 0) return;
    this->prepare(parallel);
    sums_ = Buffer<DimensionSums<R>>(slices_ * tiles_ * p_.D);
    pulled_ = Buffer<R>(blocks_ * p_.N * p_.D);
    this->run(parallel, slices_ * blocks_, p_.N * p_.M * p_.D / (slices_ * blocks_) + 1,
              [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) meet(task / blocks_, task % blocks_);
              });
    this->run(parallel, p_.N, blocks_ * p_.D, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) finish_sample(row);
    });
    this->run(parallel, tiles_, slices_ * kWidth * p_.D, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) finish_posteriors(tile);
    });
  }

 private:
  struct Rows {
    Buffer<R> z, all, all_top, dims, dims_top;
    explicit Rows(int64_t D)
        : z(kRows * D), all(kRows), all_top(kRows), dims(kRows * D), dims_top(kRows * D) {}
  };

  void meet(int64_t slice, int64_t block) {
    Rows rows(p_.D);
    const int64_t tile0 = tiles_ * block / blocks_, tile1 = tiles_ * (block + 1) / blocks_;
    const int64_t group0 = groups_ * slice / slices_, group1 = groups_ * (slice + 1) / slices_;
    DimensionSums<R>* sums = sums_ + slice * tiles_ * p_.D;
    R* pulled = pulled_ + block * p_.N * p_.D;
    std::fill_n(&sums[tile0 * p_.D].weight[0], (tile1 - tile0) * p_.D * 3 * kWidth, R(0));
    for (int64_t group = group0; group < group1; ++group) {
      const int64_t row = group * kRows;
      const int n = static_cast<int>(std::min<int64_t>(kRows, p_.N - row));
      const Shares<R> shares = read(row, n, rows);
      std::fill_n(pulled + row * p_.D, n * p_.D, R(0));
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const Meeting<R> m = this->meeting(row, n, rows.z.get(), tile);
        const auto run = [&](auto all, auto dims) {
          backward_tile<all.value, dims.value>(m, shares, sums + tile * p_.D, pulled + row * p_.D);
        };
        if (!shares.dims)
          run(std::true_type(), std::false_type());
        else if (!shares.all)
          run(std::false_type(), std::true_type());
        else
          run(std::true_type(), std::true_type());
      }
    }
  }

  Shares<R> read(int64_t row, int n, Rows& to) const {
    const int64_t columns = p_.columns(), D = p_.D;
    read_rows(p_, p_.z, row, n, to.z.get());
    const R* top = static_cast<const R*>(call_.saved) + row * columns;
    const R* sum = top + p_.N * columns;
    const R* grad_qz = static_cast<const R*>(call_.grad_qz);
    const R* grad_dims = static_cast<const R*>(call_.grad_dims);
    for (int r = 0; r < n; ++r) {
      if (grad_qz) {
        to.all.get()[r] = share_of(grad_qz[row + r], sum[r * columns]);
        to.all_top.get()[r] = top[r * columns];
      }
      for (int64_t d = 0; grad_dims && d < D; ++d) {
        to.dims.get()[r * D + d] = share_of(grad_dims[(row + r) * D + d], sum[r * columns + 1 + d]);
        to.dims_top.get()[r * D + d] = top[r * columns + 1 + d];
      }
    }
    return {grad_qz ? to.all.get() : nullptr, to.all_top.get(), grad_dims ? to.dims.get() : nullptr,
            to.dims_top.get()};
  }

  void finish_sample(int64_t row) {
    R* first = pulled_ + row * p_.D;
    for (int64_t block = 1; block < blocks_; ++block)
      add_to<R>(pulled_ + (block * p_.N + row) * p_.D, first, p_.D);
    for (int64_t d = 0; d < p_.D; ++d) first[d] = grad_z_of(first[d]);
    write_rows(p_, static_cast<const R*>(first), row, 1, call_.grad_z);
  }

  void finish_posteriors(int64_t tile) {
    DimensionSums<R>* sums = sums_ + tile * p_.D;
    for (int64_t slice = 1; slice < slices_; ++slice) {
      const DimensionSums<R>* more = sums_ + (slice * tiles_ + tile) * p_.D;
      add_to<R>(more->weight, sums->weight, 3 * kWidth * p_.D);
    }
    const size_t D = static_cast<size_t>(p_.D);
    const size_t all = padded(p_.D);
    std::vector<R> s(all), root(all), weight(all), pull(all), spread(all);
    const Dimension<R>* q = this->posteriors(tile);
    for (int j = 0; j < this->held(tile); ++j) {
      const int64_t row = tile * kWidth + j;
      read_rows(p_, p_.scale, row, 1, s.data());
      for (size_t d = 0; d < D; ++d) {
        root[d] = q[d].root[j];
        weight[d] = sums[d].weight[j];
        pull[d] = sums[d].pull[j];
        spread[d] = sums[d].spread[j];
      }
      with_param(p_.param, [&](auto param) {
        gradients_of<param.value>(static_cast<const R*>(s.data()), this->bounds_,
                                  static_cast<const R*>(root.data()), weight.data(), pull.data(),
                                  static_cast<const R*>(spread.data()), static_cast<int>(all));
      });
      write_rows(p_, static_cast<const R*>(pull.data()), row, 1, call_.grad_mu);
      write_rows(p_, static_cast<const R*>(weight.data()), row, 1, call_.grad_scale);
    }
  }

  const AggregateBackward& call_;
  int64_t groups_, slices_, blocks_;
  Buffer<DimensionSums<R>> sums_;  // [slices, tiles, D]
  Buffer<R> pulled_;               // [blocks, N, D]
};

}  // namespace

void aggregate(const AggregateForward& call, Parallel parallel) {
  if (call.dtype == DType::f64)
    ForwardAggregate<double>{call}(parallel);
  else
    ForwardAggregate<float>{call}(parallel);
}

void aggregate(const AggregateBackward& call, Parallel parallel) {
  if (call.dtype == DType::f64)
    BackwardAggregate<double>{call}(parallel);
  else
    BackwardAggregate<float>{call}(parallel);
}

}  // namespace vk::cpu
