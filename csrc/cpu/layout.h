// How the CPU kernels cut a problem: z's storage as a matrix, the matrix into chunks, a chunk into tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tile.h"

namespace vk::cpu {

// z's storage as rows of contiguous elements. Row r is the pair (r / inner, r % inner).
struct Matrix {
  enum class Kind {
    columns,  // [B, G]: a column is a group
    strips,   // [B * S, G]: a column is a group, S rows make a batch row
    cells,    // [B * G, S]: a row is the cell (b, g)
  };
  Kind kind;
  int64_t rows, cols, inner;
};

inline Matrix matrix_of(const Problem& p) {
  if (p.S == 1) return {Matrix::Kind::columns, p.B, p.G, 1};
  if (p.groups_inner) return {Matrix::Kind::strips, p.B * p.S, p.G, p.S};
  return {Matrix::Kind::cells, p.B * p.G, p.S, p.G};
}

// Calls f(row, column, at, n) for each piece of [begin, begin + n) of z's storage that lies in one row; `at`
// counts from begin.
template <class F>
VK_FN void for_segments(const Matrix& m, int64_t begin, int n, const F& f) {
  int64_t row = begin / m.cols, col = begin % m.cols;
  for (int at = 0; at < n; ++row, col = 0) {
    const int len = static_cast<int>(std::min<int64_t>(n - at, m.cols - col));
    f(row, col, at, len);
    at += len;
  }
}

// Chunks are units of parallel work. Where they begin and end depends on the shape alone, so that sums do not
// depend on the number of threads.
struct Chunk {
  int64_t row0, row1, col0, col1;
};

inline constexpr int64_t kChunk = 16384;

// Whether there are several samples of no more elements than a tile has. Then z is one array of K times those
// elements, which is cut into chunks and tiles as it is.
inline bool is_repeated(const Problem& p) { return p.K > 1 && p.numel() > 0 && p.numel() <= kTile; }

// Elements of a chunk, each of which is worked on for all K samples.
inline int64_t chunk_size(int64_t K) {
  return std::max<int64_t>(kTile, kChunk / std::max<int64_t>(K, 1) / kTile * kTile);
}

struct Chunks {
  int64_t rows, cols;  // of the matrix
  int64_t unit;        // rows that belong together: no chunk crosses a multiple of it
  int64_t row_step, col_step;
  int64_t per_unit, across;  // chunks in a unit, chunks side by side

  int64_t count() const { return down() * across; }
  int64_t down() const { return rows == 0 ? 0 : (rows + unit - 1) / unit * per_unit; }
  Chunk operator[](int64_t i) const {
    const int64_t d = i / across, c = i % across;
    const int64_t start = d / per_unit * unit, end = std::min(rows, start + unit);
    const int64_t row0 = std::min(end, start + d % per_unit * row_step);
    return {row0, std::min(end, row0 + row_step), c * col_step, std::min(cols, (c + 1) * col_step)};
  }
};

// `bits`: the chunk's cells are written as packed bits, so it starts on a whole byte.
inline Chunks chunks_of(const Matrix& m, bool bits, int64_t K) {
  Chunks c{m.rows, m.cols, std::max<int64_t>(m.rows, 1), 0, m.cols, 1, 1};
  const int64_t size = chunk_size(K);
  c.row_step = std::max<int64_t>(1, size / std::max<int64_t>(m.cols, 1));
  if (m.kind == Matrix::Kind::columns) {
    if (m.cols > kTile && !(bits && m.cols % 8 != 0)) {
      // Tall chunks, whose sums stay in the first-level cache and are few. Two tiles wide, since the
      // processor reads ahead within 4 KiB: with one tile of float32 the forward takes 1.1 to 1.4 times as
      // long.
      c.col_step = 2 * kTile;
      c.row_step = 2 * size / c.col_step;
    }
    c.row_step = (c.row_step + 7) / 8 * 8;
  } else if (m.kind == Matrix::Kind::strips) {
    c.unit = c.row_step >= m.inner ? c.row_step / m.inner * m.inner : m.inner;
    c.row_step = std::min(c.row_step, c.unit);
    if (c.unit != m.inner) c.row_step = c.unit;
  } else if (m.cols > size) {
    c.col_step = size;
  }
  c.per_unit = (c.unit + c.row_step - 1) / c.row_step;
  c.across = m.cols == 0 ? 1 : (m.cols + c.col_step - 1) / c.col_step;
  return c;
}

// Elements of a tile: as many whole rows as fit, so that the loops can run over rows of at least kBlock in
// place and others are not cut; kTile where that would leave more than 32 of the normals unused, which are
// drawn 128 at a time. By the shape alone, as the sums go by tiles. All elements where they fit:
// `is_repeated` relies on it.
inline int tile_of(const Matrix& m) {
  const int64_t all = m.rows * m.cols;
  if (all > 0 && all <= kTile) return static_cast<int>(all);
  for (const int64_t row : {m.cols * m.inner, m.cols}) {
    if (row == 0 || row >= kTile) continue;
    const int tile = kTile / static_cast<int>(row) * static_cast<int>(row);
    if ((-tile & (4 * kQuadLanes - 1)) <= 32) return tile;
  }
  return kTile;
}

// Calls f(begin, n) for each tile of a chunk: pieces of z's storage no longer than kTile.
template <class F>
VK_FN void for_tiles(const Matrix& m, const Chunk& c, const F& f) {
  const int tile = tile_of(m);
  const bool whole = c.col0 == 0 && c.col1 == m.cols;
  const int64_t lines = whole ? 1 : c.row1 - c.row0;
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t begin = (c.row0 + line) * m.cols + c.col0;
    const int64_t end = whole ? c.row1 * m.cols : begin + (c.col1 - c.col0);
    for (int64_t i = begin; i < end; i += tile) f(i, static_cast<int>(std::min<int64_t>(tile, end - i)));
  }
}

// ---- tensors seen through the matrix ---------------------------------------------------------------------

template <class T, class F>
VK_FN decltype(auto) as_type(DType dtype, const F& f) {
  // T is the compute type: it settles which storage types are possible.
  if constexpr (sizeof(T) == 8) {
    (void)dtype;
    return f(double());
  } else {
    if (dtype == DType::bf16) return f(BFloat16());
    if (dtype == DType::f16) return f(Half());
    return f(float());
  }
}

// Where the elements of a tensor lie, in the order of z's storage. `contiguous_` elements that are neighbours
// there are neighbours in the tensor as well; the next so many begin `step_` elements further on.
template <class R>
class View {
 public:
  View() = default;
  View(void* data, const Strides& s, const Problem& p, const Matrix& m)
      : data_(data), dtype_(p.dtype), m_(m) {
    outer_ = s.b;
    inner_ = m.kind == Matrix::Kind::cells ? s.g : s.s;
    col_ = m.kind == Matrix::Kind::cells ? s.s : s.g;
    if (m.cols > 1 && col_ != 1) return;
    const bool one_outer = m.rows == m.inner;
    contiguous_ = m.cols;
    if (m.inner > 1 && inner_ != contiguous_) {
      if (one_outer || outer_ == m.inner * inner_) step_ = inner_;
      return;
    }
    contiguous_ *= m.inner;
    step_ = outer_;
    if (!one_outer && outer_ != contiguous_) return;
    whole_ = true;
    contiguous_ = step_ = m.rows * m.cols;
  }
  View(const Input& in, const Problem& p, const Matrix& m)
      : View(const_cast<void*>(in.data), in.stride, p, m) {}
  View(const Output& out, const Problem& p, const Matrix& m) : View(out.data, out.stride, p, m) {}

  explicit operator bool() const { return data_ != nullptr; }

  // The view of a block that begins `elements` further on and lies as this one does.
  View block(int64_t elements) const {
    View view = *this;
    view.data_ = static_cast<char*>(data_) + elements * item_size(dtype_);
    return view;
  }

  // The width that the rows of a tile have to have for the tile to be computed in place; kTile where any will
  // do, or none. Rows of 17 to 21 are faster copied than computed as two blocks, much of it twice.
  int width() const {
    if (!same_type() || step_ == 0 || contiguous_ < kBlock || contiguous_ >= kTile) return kTile;
    const int row = static_cast<int>(contiguous_);
    const int computed = (row + kBlock - 1) / kBlock * kBlock;
    return tile_of(m_) % row == 0 && 2 * computed <= 3 * row ? row : kTile;
  }

  // n elements from `begin` of z's storage as rows of `width`: where they are if they can be read like a tile
  // there, else in `buffer`.
  Rows<const R> read(int64_t begin, int n, int width, R* buffer) const {
    if (const Rows<R> there = direct(begin, n, width); there.at) return {there.at, there.stride};
    as_type<R>(dtype_, [&](auto zero) {
      const auto* data = static_cast<const decltype(zero)*>(data_);
      for_pieces(begin, n, [&](int64_t from, int64_t stride, int at, int rows, int len) {
        if (contiguous_ != 0)
          load_rows(data + from, stride, rows, len, buffer + at);
        else
          for (int i = 0; i < len; ++i) buffer[at + i] = widen(data[from + i * col_]);
      });
    });
    return {buffer, width};
  }

  // Where a tile may be computed in place; null where it has to go through `write`.
  Rows<R> direct(int64_t begin, int n, int width) const {
    if (!same_type() || n % width != 0) return {};
    R* data = static_cast<R*>(data_);
    if (is_contiguous(begin, n)) return {data + offset(begin), width};
    if (contiguous_ == width && step_ != 0 && begin % width == 0) return {data + offset(begin), step_};
    return {};
  }

  void write(int64_t begin, int n, const R* from) const {
    as_type<R>(dtype_, [&](auto zero) {
      auto* data = static_cast<decltype(zero)*>(data_);
      for_pieces(begin, n, [&](int64_t to, int64_t stride, int at, int rows, int len) {
        if (contiguous_ != 0)
          store_rows(from + at, data + to, stride, rows, len);
        else
          for (int i = 0; i < len; ++i) narrow(from[at + i], data[to + i * col_]);
      });
    });
  }

 private:
  bool same_type() const { return sizeof(R) == 8 || dtype_ == DType::f32; }
  bool is_contiguous(int64_t begin, int n) const {
    return whole_ || (contiguous_ != 0 && begin % contiguous_ + n <= contiguous_);
  }
  int64_t offset(int64_t begin) const {
    if (whole_) return begin;
    if (step_ != 0) return begin / contiguous_ * step_ + begin % contiguous_;
    const int64_t row = begin / m_.cols;
    return row / m_.inner * outer_ + row % m_.inner * inner_ + begin % m_.cols * col_;
  }

  // Calls f(offset in memory, stride, offset in the tile, rows, length of a row) for the pieces that make up
  // [begin, begin + n): all whole contiguous pieces in one call, and one call for a part of a piece at either
  // end. Without a single step_, one call for each row of the matrix.
  template <class F>
  void for_pieces(int64_t begin, int n, const F& f) const {
    const int64_t length = step_ != 0 ? contiguous_ : m_.cols;
    for (int at = 0; at < n;) {
      const int64_t left = length - (begin + at) % length;
      const int len = static_cast<int>(std::min<int64_t>(n - at, left));
      const int rows = step_ != 0 && len == length ? (n - at) / len : 1;
      f(offset(begin + at), step_, at, rows, len);
      at += rows * len;
    }
  }

  void* data_ = nullptr;
  DType dtype_ = DType::f32;
  Matrix m_{};
  int64_t outer_ = 0, inner_ = 0, col_ = 0;
  bool whole_ = false;      // all elements are contiguous
  int64_t contiguous_ = 0;  // 0: no two elements are
  int64_t step_ = 0;        // 0: no single distance, or nothing contiguous
};

// The normals of a tile, sample k.
template <class R>
class Normals {
 public:
  Normals(const Problem& p, int64_t numel) : numel_(numel) {
    const uint64_t seed = p.host_state ? p.seed : static_cast<uint64_t>(p.rng[0]);
    const uint64_t offset = p.host_state ? p.offset : static_cast<uint64_t>(p.rng[1]);
    keys_ = philox_keys(seed, offset);
  }

  struct Buffer {
    R eps[4 * kMostQuads];
  };

  const R* operator()(int64_t k, int64_t begin, int n, Buffer& buffer) const {
    const uint64_t first = static_cast<uint64_t>(k * numel_ + begin);
    const int lead = static_cast<int>(first % 4);
    const int quads = (lead + n + 3) / 4;
    const int whole = (quads + kQuadLanes - 1) / kQuadLanes * kQuadLanes;
    if constexpr (sizeof(R) == 4) {
      generator_.normals(keys_, first / 4, whole, buffer.eps);
    } else {
      Words words[kMostQuads];
      generator_.words(keys_, first / 4, whole, words);
      normals_of(words, quads, buffer.eps);
    }
    return buffer.eps + lead;
  }

 private:
  const Generator& generator_ = best_generator();
  PhiloxKeys keys_{};
  int64_t numel_;
};

}  // namespace vk::cpu
