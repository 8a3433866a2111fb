// From the blocks' sums to the results: rows, tiles of groups, the loss. Computed by the blocks that arrive
// last, or by a kernel of its own; the same code in the same order in both cases.
#pragma once

#include "forward.cuh"
#include "reduce.cuh"

namespace vk::cuda {

// An invalid threshold (negative, NaN) makes the value NaN: reading device memory to check it before the
// launch would have to wait for the GPU.
template <class R>
struct FreeBits {
  R lambda;
  __device__ bool open(R x) const { return x >= lambda; }
  __device__ R value(R x, Penalty penalty) const {
    return clamp_value(lambda >= R(0) ? x : nan_of<R>(), lambda, penalty);
  }
};

template <class R>
__device__ __forceinline__ FreeBits<R> free_bits_of(const ForwardArgs<R>& a, int64_t group) {
  return {a.free_bits_per_group ? a.free_bits_per_group[group] : a.free_bits};
}

// The sum of the weights that a part of a tile counts.
template <class R>
__device__ R part_weight(const ForwardArgs<R>& a, int part, R* shared) {
  const int chunk = part / a.g.splits, split = part % a.g.splits;
  const int64_t step = a.g.folded ? a.g.split_length : a.g.chunk_rows;
  const int64_t begin = (a.g.folded ? split : chunk) * step;
  const int64_t end = a.g.folded || split == 0 ? min(a.rows, begin + step) : begin;
  R sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += a.weight[i];
  return block_sum(shared, sum);
}

// The sum of all weights, as far as the parts of a tile that has been completed tell.
template <class R>
__device__ R total_weight(const ForwardArgs<R>& a, int64_t tile, R* shared) {
  if (a.weight == nullptr) return static_cast<R>(a.rows);
  const int parts = a.g.parts();
  if (parts == 1) return part_weight(a, 0, shared);
  R sum = 0;
  for (int i = threadIdx.x; i < parts; i += blockDim.x) sum += __ldcg(a.weights + tile * parts + i);
  return block_sum(shared, sum);
}

// Adds the parts' sums of a tile into sums[0 .. width).
template <class R>
__device__ void gather_tile(const ForwardArgs<R>& a, int64_t tile, R* sums) {
  const int width = a.g.width(), parts = a.g.parts();
  const R* from = a.sums + tile * parts * width;
  const int across = min(width, static_cast<int>(blockDim.x)), down = blockDim.x / across;
  __syncthreads();
  for (int base = 0; base < width; base += across) {
    const int column = base + threadIdx.x % across;
    R sum = 0;
#pragma unroll 8
    for (int part = threadIdx.x / across; part < parts; part += down)
      sum += __ldcg(from + int64_t{part} * width + column);
    // `down` rows of `across`, or (down = 1) one piece of a wider row.
    sums[base + threadIdx.x] = sum;
  }
  __syncthreads();
  sum_rows(sums, across, down);
}

// Rates, gates and this tile's share of the loss from the sums over all rows in sums[0 .. width).
template <class R>
__device__ R finish_tile(const ForwardArgs<R>& a, int64_t tile, R weight, R* sums) {
  const int width = a.g.width();
  const R inverse = R(1) / weight;
  R loss = 0;
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    const int64_t group = tile * width + c;
    if (group >= a.groups) continue;
    const R sum = sums[c], rate = sum / weight;
    a.kl_per_group[group] = a.group_sums ? sum : rate;
    if (a.clamp == Clamp::batch) {
      const FreeBits<R> bits = free_bits_of(a, group);
      a.gate[group] = bits.open(rate) ? inverse : -inverse;
      // Without any weight there is no mean to clamp: 0, or the NaN of a row that is not finite.
      loss += weight == R(0) ? sum : bits.value(rate, a.penalty);
    } else {
      loss += sum;
    }
  }
  if (a.clamp != Clamp::batch && tile == 0 && threadIdx.x == 0) a.gate[0] = inverse;
  return block_sum(sums, loss);
}

// Completes the rows of a set: their values from the parts of several blocks, their open bits, and returns
// the sum of their values for the loss.
template <class R>
__device__ R finish_rows(const ForwardArgs<R>& a, int64_t set, R* shared) {
  const int64_t step = a.g.folded ? a.g.split_length : a.g.chunk_rows;
  const int64_t begin = set * step, end = min(a.rows, begin + step);
  R loss = 0;
  if (a.g.cells == Cells::scratch) {
    const int lane = threadIdx.x % 32;
    for (int64_t b = begin + threadIdx.x / 32; b < end; b += blockDim.x / 32) {
      R row = 0;
      for (int64_t group = lane; group < a.groups; group += 32) {
        R* parts = a.cells + (b * a.groups + group) * a.g.splits;
        R cell = 0;
        for (int split = 0; split < a.g.splits; ++split) cell += __ldcg(parts + split);
        parts[0] = cell;
        row += a.clamp == Clamp::sample ? free_bits_of(a, group).value(cell, a.penalty) : cell;
      }
      row = lane_sum(row, 32);
      if (lane == 0) {
        if (a.reduction == Reduction::none) a.kl[b] = row;
        loss += a.weight ? a.weight[b] * row : row;
      }
    }
    __syncthreads();
  } else if (a.row_values != nullptr) {
    for (int64_t b = begin + threadIdx.x; b < end; b += blockDim.x) {
      R row = 0;
      for (int64_t tile = 0; tile < a.g.tiles; ++tile) row += __ldcg(a.row_values + b * a.g.tiles + tile);
      a.kl[b] = row;
    }
  }
  if (a.clamp == Clamp::sample && (a.g.cells == Cells::scratch || a.masks != nullptr)) {
    // Sets begin at a multiple of 8 rows, so at a whole byte.
    const int64_t cells = end * a.groups, vectors = a.g.vectors();
    for (int64_t byte = begin * a.groups / 8 + threadIdx.x; byte < (cells + 7) / 8; byte += blockDim.x) {
      int64_t cell = byte * 8, b = cell / a.groups, group = cell % a.groups;
      unsigned bits = 0;
      for (int bit = 0; bit < 8 && cell < cells; ++bit, ++cell) {
        bool open;
        if (a.g.cells == Cells::scratch)
          open = free_bits_of(a, group).open(a.cells[cell * a.g.splits]);
        else
          open = (__ldcg(a.masks + b * vectors + group / a.g.vector) >> (group % a.g.vector) & 1) != 0;
        bits |= static_cast<unsigned>(open) << bit;
        if (++group == a.groups) {
          group = 0;
          ++b;
        }
      }
      a.open[byte] = static_cast<uint8_t>(bits);
    }
  }
  return block_sum(shared, loss);
}

// The loss from the shares of tiles, blocks or row sets.
template <class R>
__device__ void finish_loss(const ForwardArgs<R>& a, R* shared) {
  if (!a.has_loss()) return;
  R sum = 0;
  for (int64_t i = threadIdx.x; i < a.loss_count(); i += blockDim.x) sum += __ldcg(a.losses + i);
  sum = block_sum(shared, sum);
  const R weight = total_weight(a, 0, shared);
  if (threadIdx.x != 0) return;
  if (a.clamp == Clamp::batch) {
    // Already a mean over the batch; without any weight there is none.
    if (a.reduction == Reduction::sum)
      sum = weight == R(0) ? sum : sum * weight;
    else if (weight == R(0))
      sum = nan_of<R>();
  } else if (a.reduction != Reduction::sum) {
    sum /= weight;
  }
  a.kl[0] = a.reduction == Reduction::mean ? sum / a.row_size : sum;
}

// Called once a block has its sums in sums[0 .. width): writes them to scratch memory where other blocks work
// on the same tile, and finishes the tile, the rows and the loss where this block is the last one that they
// waited for. `clamped`: this thread's share of a loss of clamped elements. kCells: whether single cells may
// matter (Geometry::cells); without them 48 registers are enough.
template <bool kCells, class R>
__device__ __noinline__ void finish_block(const ForwardArgs<R>& a, int64_t tile, int part, R clamped,
                                          int* flag, R* sums) {
  const int width = a.g.width(), parts = a.g.parts();
  const int64_t block = tile * parts + part;
  const bool counting = a.counters != nullptr;
  R* behind = sums + width;  // for block_sum, which must not overwrite the sums
  if (parts > 1) {
    for (int c = threadIdx.x; c < width; c += blockDim.x) a.sums[block * width + c] = sums[c];
    if (a.weight != nullptr) {
      const R weight = part_weight(a, part, behind);
      if (threadIdx.x == 0) a.weights[block] = weight;
    }
  }
  if (kCells && a.clamps_elements()) {
    const R share = block_sum(behind, clamped);
    if (threadIdx.x == 0) a.losses[block] = share;
  }

  bool last = a.one_block();
  if (kCells && a.finishes_rows()) {
    const int64_t set = a.g.folded ? part : part / a.g.splits;
    const unsigned writers = static_cast<unsigned>(a.row_writers());
    if (writers == 1 || (counting && block_arrives_last(a.counters + 1 + set, writers, flag))) {
      __syncthreads();
      const R share = finish_rows(a, set, behind);
      if (a.clamps_cells() && threadIdx.x == 0) a.losses[set] = share;
      if (counting) last = block_arrives_last(a.counters, static_cast<unsigned>(a.arrivals()), flag);
    }
  }
  const int64_t tile_counter = 1 + static_cast<int64_t>(kCounters) / 2 + tile;
  if (parts == 1 ||
      (counting && block_arrives_last(a.counters + tile_counter, static_cast<unsigned>(parts), flag))) {
    if (parts > 1) gather_tile(a, tile, sums);
    const R weight = total_weight(a, tile, behind);
    const R share = finish_tile(a, tile, weight, sums);
    if (a.clamp != Clamp::sample && threadIdx.x == 0) a.losses[tile] = share;
    if (counting) last = block_arrives_last(a.counters, static_cast<unsigned>(a.arrivals()), flag) || last;
  }
  if (last) {
    __syncthreads();
    finish_loss(a, sums);
  }
}

// The end of a block's work: adds up its threads' sums, by column or (row) one number for each thread, writes
// the block's partial sums and finishes what they complete.
template <Tiling kTiling, bool kCells, int kSums, class R>
__device__ __forceinline__ void write_partials(const ForwardArgs<R>& a, const ThreadOffsets& p,
                                               const R (&sum)[kSums], R clamped, unsigned char* shared) {
  int* flag = reinterpret_cast<int*>(shared);
  R* sums = reinterpret_cast<R*>(shared + kFlagBytes);
  const int width = a.g.width();
  const int height = kTiling == Tiling::column ? a.g.ty() : a.g.tx();  // threads that share a group
  const int line = p.tz * height + (kTiling == Tiling::column ? p.ty : p.tx);
#pragma unroll
  for (int j = 0; j < kSums; ++j)
    sums[line * width + (kTiling == Tiling::column ? p.tx * kSums + j : p.ty)] = sum[j];
  __syncthreads();
  sum_rows(sums, width, height * a.g.tz());
  finish_block<kCells>(a, p.tile, p.part, clamped, flag, sums);
}

// Does for a captured launch what the last blocks do in other launches, with as many threads: a block for
// each tile and each set of rows that is not complete yet, then (`loss`) one block for the loss.
template <class R>
__global__ void __launch_bounds__(1024) finish_kernel(const __grid_constant__ ForwardArgs<R> a, bool loss) {
  VK_SHARED(shared);
  R* sums = reinterpret_cast<R*>(shared);
  if (!loss) {
    const int64_t open_tiles = a.open_tiles();
    R* behind = sums + a.g.width();
    if (blockIdx.x < open_tiles) {
      const int64_t tile = blockIdx.x;
      gather_tile(a, tile, sums);
      const R weight = total_weight(a, tile, behind);
      const R share = finish_tile(a, tile, weight, sums);
      if (a.clamp != Clamp::sample && threadIdx.x == 0) a.losses[tile] = share;
    } else {
      const int64_t set = blockIdx.x - open_tiles;
      const R share = finish_rows(a, set, behind);
      if (a.clamps_cells() && threadIdx.x == 0) a.losses[set] = share;
    }
    if (gridDim.x > 1) return;
    __syncthreads();
  }
  finish_loss(a, sums);
}

}  // namespace vk::cuda
