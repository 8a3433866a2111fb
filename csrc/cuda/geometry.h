// How a problem is cut for the GPU: which axis a thread loops along, what a block owns, how many blocks there
// are.
//
// z's storage is seen as [B, O, I], I innermost. A block owns a tile of groups, so that their sums need no
// other block but those that share the tile:
//   column  groups lie along I (and, for [B, D], O counts the batch rows): a thread has a vector of columns
//   and
//           loops along O;
//   row     a group is a row: threads share a row and loop along I. Without a KL there are no groups, and a
//           whole tensor may be one row.
// Everything here depends on the problem alone, not on the GPU, so that sums have the same bits on every GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "../problem.h"

namespace vk::cuda {

enum class Tiling { row, column };

// Where a tensor lies: the strides of [B, O, I] in elements.
struct Axes {
  const void* data = nullptr;
  int64_t b = 0, o = 0, i = 0;
};

// What happens to the values of single cells KL[b, g].
enum class Cells : uint8_t {
  none,      // nothing: sums over the batch are all that is wanted
  elements,  // a cell is an element, and its thread clamps it
  sums,      // a cell is a sum that one block has, and clamps
  scratch,   // a cell is a sum: kept in scratch memory until its batch row is complete
};

struct Geometry {
  Tiling tiling = Tiling::row;
  bool folded = false;  // column: O counts batch rows, B is 1
  Cells cells = Cells::none;
  bool aligned = true;  // no quad of normals is split between vectors
  bool plain = false;   // for the kernels of plain.cuh, which says what that is
  int64_t B = 1, O = 1, I = 1;
  int vector = 4;  // elements per thread and step: a quad, or the two that 16 bytes of a 16-bit type hold

  int log_tx = 0, log_ty = 0, log_tz = 0;  // threads along I, O and B
  int log_k = 0;                           // lanes that share the samples of a vector
  int64_t tiles = 1;
  int chunks = 1, splits = 1;  // parts of a tile: pieces of B, and pieces of the axis that threads loop along
  int64_t chunk_rows = 1, split_length = 1;

  VK_FN int tx() const { return 1 << log_tx; }
  VK_FN int ty() const { return 1 << log_ty; }
  VK_FN int tz() const { return 1 << log_tz; }
  VK_FN int threads() const { return tx() * ty() * tz() << log_k; }
  VK_FN int parts() const { return chunks * splits; }
  VK_FN int width() const { return tiling == Tiling::column ? tx() * vector : ty(); }  // groups in a tile
  // Sets of batch rows that are finished together.
  VK_FN int64_t row_sets() const { return folded ? splits : chunks; }
  VK_FN int64_t vectors() const { return (I + vector - 1) / vector; }
  // The distance in a tensor, in elements, between one step of a thread's loop and the next.
  int64_t step_of(const Axes& a) const {
    return tiling == Tiling::column ? ty() * a.o : static_cast<int64_t>(tx()) * vector * a.i;
  }
};

inline constexpr int kBlock = 256;
// A problem of at most this many vectors is computed by one, larger block: a second one would cost more than
// it saves.
inline constexpr int kSmall = 1024, kSmallBlock = 512;
// Blocks of 256 threads with 48 registers that run at the same time on 132 multiprocessors: a wave. Blocks
// come in whole waves: with 1.5 of them the multiprocessors of an H200 were idle for a quarter of the time.
inline constexpr int64_t kWave = 660;
// The steps of a thread, where there is enough to do. Blocks that share sums make many, since each of them
// takes 1 us to add up its threads and to be counted.
inline constexpr int64_t kSteps = 8, kReducingSteps = 32;
// The most blocks that share sums.
inline constexpr int64_t kReducingBlocks = 4 * kWave;

// Plain kernels count the quads of z and a tensor's 16-byte vectors in 32 bits.
inline constexpr int64_t kMostPlain = int64_t{1} << 32;
// Plain kernels have blocks of their own for every sample, which read mu and the scale again: from the
// second-level cache, as long as that holds both.
inline constexpr int64_t kRereadBytes = int64_t{1} << 23;
// The most blocks along the second and the third axis of a grid.
inline constexpr int64_t kMostBlocks = 65535;

VK_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int ceil_log2(int64_t n, int most) {
  int log = 0;
  while (log < most && (int64_t{1} << log) < n) ++log;
  return log;
}

// The tensors of a call while its axes are merged.
template <size_t N>
struct Tensors {
  std::array<Axes*, N> axes;

  // Merges O into I where the strides of every tensor allow it.
  bool merge_inner(Geometry& g) const {
    for (Axes* a : axes)
      if (g.O != 1 && g.I != 1 && a->o != a->i * g.I) return false;
    for (Axes* a : axes) {
      if (g.I == 1 && g.O != 1) a->i = a->o;
      a->o = 0;
    }
    g.I *= g.O;
    g.O = 1;
    return true;
  }

  // Merges B into O.
  bool merge_outer(Geometry& g) const {
    for (Axes* a : axes)
      if (g.B != 1 && g.O != 1 && a->b != a->o * g.O) return false;
    for (Axes* a : axes) {
      if (g.O == 1 && g.B != 1) a->o = a->b;
      a->b = 0;
    }
    g.O *= g.B;
    g.B = 1;
    return true;
  }
};

template <class V>
Axes axes_of(const V& view, const Problem& p) {
  const Strides& s = view.stride;
  if (p.S == 1) return {view.data, s.b, 0, s.g};
  return p.groups_inner ? Axes{view.data, s.b, s.s, s.g} : Axes{view.data, s.b, s.g, s.s};
}

// Whether whole vectors can be moved, 16 bytes at a time.
inline bool is_wide(const Axes& a, const Geometry& g, int size) {
  return reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && (g.I <= 1 || a.i == 1) &&
         (g.O == 1 || a.o * size % 16 == 0) && (g.B == 1 || a.b * size % 16 == 0);
}

// The same of z, and of what is dense like it: K blocks of numel elements.
inline bool is_wide_dense(const void* data, const Geometry& g, int64_t K, int size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (g.B * g.O == 1 || g.I * size % 16 == 0) &&
         (K <= 1 || g.B * g.O * g.I * size % 16 == 0);
}

// What a kernel computes, as far as the shape of the blocks depends on it.
struct Purpose {
  bool kl = false;            // groups matter
  bool sample = false;        // normals are drawn
  bool reduces = false;       // blocks add up sums
  bool adds_samples = false;  // a thread adds up numbers of all samples
  bool plain =
      false;  // nothing that Geometry::plain does not settle itself keeps the vectors from being plain
  const void* dense = nullptr;  // z or its gradient
};

// The tiling, and B, O and I.
template <size_t N>
Geometry view_of(const Problem& p, const Purpose& purpose, const Tensors<N>& tensors) {
  Geometry g;
  const bool column = p.S == 1 || p.groups_inner;
  g.B = p.B;
  g.O = p.S == 1 ? 1 : (column ? p.S : p.G);
  g.I = column ? p.G : p.S;
  const bool cells = purpose.kl && (p.clamp == Clamp::sample || p.reduction == Reduction::none);
  const bool rows_alike = !cells && p.weight == nullptr;

  if (!purpose.kl || (p.G == 1 && rows_alike)) {
    // All elements are treated alike: the longest rows that the strides allow.
    if (tensors.merge_inner(g) && tensors.merge_outer(g)) tensors.merge_inner(g);
    g.tiling = purpose.kl || g.I >= 512 ? Tiling::row : Tiling::column;
    if (purpose.kl && g.O != 1) {  // O counts batch rows here, which a row kernel takes for groups
      g.B = g.O;
      g.O = 1;
      for (Axes* a : tensors.axes) {
        a->b = a->o;
        a->o = 0;
      }
    }
  } else if (column) {
    g.tiling = Tiling::column;
    g.folded = p.S == 1;
    if (g.folded || rows_alike) tensors.merge_outer(g);
  }
  if (cells && purpose.reduces) g.cells = g.folded ? Cells::elements : Cells::scratch;
  g.aligned = (g.B * g.O == 1 || g.I % 4 == 0) && (p.K <= 1 || p.numel() % 4 == 0);
  return g;
}

// How many vectors a thread moves at a time, and how many threads lie along I, O and B, and along the
// samples.
inline void set_block(Geometry& g, const Problem& p, const Purpose& purpose) {
  const int size = item_size(p.dtype);
  const bool reduces = purpose.reduces;
  g.vector = g.plain ? 16 / size : 4;
  // One block computes a small problem, if it can then do without the counters.
  const int64_t vectors = g.vectors(), all = g.B * g.O * vectors;
  const bool one_block = reduces && all <= kSmall;
  // A thread needs half a microsecond for each sample of its own.
  while (purpose.adds_samples && g.log_k < 3 && 1 << g.log_k < p.K && all << (g.log_k + 1) <= kWave * kBlock)
    ++g.log_k;
  const int most = ceil_log2(one_block && g.plain ? kSmallBlock : kBlock, 10) - g.log_k;
  if (g.tiling == Tiling::column) {
    // One tile, if a warp can hold it and its parts are few, or many tiles of one part. Else tiles of 128
    // bytes, so that the sums of each tile's parts are few: 8 KiB to 84 KiB, of which a block reads 100 bytes
    // in a nanosecond.
    const int64_t steps = g.O >> (most - ceil_log2(vectors, 5));  // of a thread, if a tile had one part
    const bool narrow = reduces && steps > 8 && (vectors > 32 || all > kWave * kBlock);
    g.log_tx = ceil_log2(vectors, narrow ? ceil_log2(128 / (g.vector * size), 5) : 5);
    // Narrower tiles where wide ones would leave more than a quarter of the last one idle.
    while (g.log_tx > 3 && (ceil_div(vectors, g.tx()) * g.tx() - vectors) * 4 > vectors) --g.log_tx;
    g.log_ty = ceil_log2(g.O, most - g.log_tx);
    g.tiles = ceil_div(vectors, g.tx());
  } else {
    g.log_tx = ceil_log2(vectors, most);
    g.log_ty = ceil_log2(g.O, most - g.log_tx);
    g.tiles = ceil_div(g.O, g.ty());
  }
  g.log_tz = std::max(ceil_log2(g.B, most - g.log_tx - g.log_ty), 5 - g.log_tx - g.log_ty);
  g.tiles = std::max<int64_t>(g.tiles, 1);
}

// The parts of a tile.
inline void set_parts(Geometry& g, bool reduces) {
  const bool one_block = reduces && g.tiles == 1 && g.B * g.O * g.vectors() <= kSmall;
  const int64_t along = g.tiling == Tiling::column ? g.O : g.I;
  const int64_t step = g.tiling == Tiling::column ? g.ty() : static_cast<int64_t>(g.tx()) * g.vector;
  const int64_t steps = std::max<int64_t>(1, ceil_div(along, step));
  const int64_t row_steps = std::max<int64_t>(1, ceil_div(g.B, g.tz()));
  const int64_t all = steps * row_steps;
  int64_t waves = ceil_div(g.tiles * all, kWave * (reduces ? kReducingSteps : kSteps));
  if (reduces) waves = std::min(waves, kReducingBlocks / kWave);
  int64_t parts = one_block ? 1 : std::clamp<int64_t>(waves * kWave / g.tiles, 1, std::min(all, kMostBlocks));
  parts = ceil_div(all, ceil_div(all, parts));

  const int64_t round = g.cells == Cells::none ? 1 : 8;  // bits are packed by whole bytes
  g.chunk_rows = ceil_div(ceil_div(row_steps, std::min(parts, row_steps)) * g.tz(), round) * round;
  g.chunks = static_cast<int>(std::max<int64_t>(1, ceil_div(g.B, g.chunk_rows)));
  const int64_t splits = std::clamp<int64_t>(parts / g.chunks, 1, steps);
  g.split_length = ceil_div(ceil_div(steps, splits) * step, round) * round;
  g.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(along, g.split_length)));
}

// Whether every vector of `a`, and of what is laid out like it, has a 32-bit index and can be moved whole.
inline bool is_plain(const Axes& a, const Geometry& g, int size) {
  return is_wide(a, g, size) && ((g.B - 1) * a.b + (g.O - 1) * a.o + g.I) * size / 16 <= kMostPlain;
}

inline bool laid_out_alike(const Axes& a, const Axes& b, const Geometry& g) {
  return (g.O == 1 || a.o == b.o) && (g.B == 1 || a.b == b.b);
}

// `tensors`: means and scales by turns.
template <size_t N>
Geometry geometry_of(const Problem& p, const Purpose& purpose, const Tensors<N>& tensors) {
  Geometry g = view_of(p, purpose, tensors);
  const int size = item_size(p.dtype);
  const bool rereads = p.K <= kMostBlocks && p.numel() * size <= kRereadBytes;
  g.plain = purpose.plain && p.dtype != DType::f64 && (!purpose.sample || p.K == 1 || rereads) &&
            g.cells == Cells::none && g.I * size % 16 == 0 &&
            std::max<int64_t>(p.K, 1) * (p.numel() / 4) < kMostPlain &&
            is_plain({purpose.dense, g.O * g.I, g.I, 1}, g, size);
  for (size_t i = 0; i < N; ++i) g.plain = g.plain && is_plain(*tensors.axes[i], g, size);
  for (size_t i = 0; i < N; i += 2)
    g.plain = g.plain && laid_out_alike(*tensors.axes[i], *tensors.axes[i + 1], g);
  set_block(g, p, purpose);
  set_parts(g, purpose.reduces);
  // One block has whole cells, and of open bits whole bytes.
  if (g.cells == Cells::scratch && g.splits == 1 &&
      (p.clamp != Clamp::sample || (p.G % 8 == 0 && g.width() % 8 == 0)))
    g.cells = Cells::sums;
  return g;
}

}  // namespace vk::cuda
