// From the blocks' sums to the results: rows, tiles of groups, the loss. Computed by the blocks that arrive
// last, or by a kernel of its own; the same code in the same order in both cases.
//
// Everything waits for the last block, which runs this code once: what takes its time is fetching
// instructions and parameters. So loops are not unrolled, what is rarely needed is not inlined, and functions
// that are not inlined take numbers: through a reference, each field of ForwardArgs would be a load from
// memory.
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

// The sum of `count` numbers, the same for all threads of the block.
template <class R>
__device__ __noinline__ R sum_of(const R* from, int64_t count, R* shared) {
  R sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += __ldcg(from + i);
  return block_sum(shared, sum);
}

// The sum of the weights that a part of a tile counts.
template <class R>
__device__ __forceinline__ R part_weight(const ForwardArgs<R>& a, int part, R* shared) {
  const int chunk = part / a.g.splits, split = part % a.g.splits;
  const int64_t step = a.g.folded ? a.g.split_length : a.g.chunk_rows;
  const int64_t begin = (a.g.folded ? split : chunk) * step;
  const int64_t end = a.g.folded || split == 0 ? min(a.rows, begin + step) : begin;
  return sum_of(a.weight + begin, end - begin, shared);
}

// The sum of all weights, as far as the parts of a tile that has been completed tell.
template <class R>
__device__ __forceinline__ R total_weight(const ForwardArgs<R>& a, int64_t tile, R* shared) {
  if (a.weight == nullptr) return static_cast<R>(a.rows);
  const int parts = a.g.parts();
  if (parts == 1) return part_weight(a, 0, shared);
  return sum_of(a.weights + tile * parts, parts, shared);
}

// 16 or, of doubles, 32 bytes that other blocks have written.
template <class R>
__device__ __forceinline__ void load_written(const R* from, R (&out)[4]) {
  if constexpr (sizeof(R) == 4) {
    const float4 four = __ldcg(reinterpret_cast<const float4*>(from));
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double2 two = __ldcg(reinterpret_cast<const double2*>(from) + i);
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
}
template <class R>
__device__ __forceinline__ void load_written(const R* from, R (&out)[1]) {
  out[0] = __ldcg(from);
}

// Adds the parts' sums of a tile into sums[0 .. width). Each thread has N columns of every `down`-th part,
// which it adds in their order; then those of a warp are added by a butterfly, then the warps in their order.
// Four loads are under way at a time: one after the other, each would wait 0.2 us for the second-level cache.
template <int N, class R>
__device__ __forceinline__ void gather_columns(const ForwardArgs<R>& a, int64_t tile, R* sums) {
  constexpr int kLoads = 4;
  const int width = a.g.width(), parts = a.g.parts();
  const int across = min(width / N, static_cast<int>(blockDim.x)), log = 31 - __clz(across);
  const int down = static_cast<int>(blockDim.x) >> log;
  const int height = across < 32 ? static_cast<int>(blockDim.x) / 32 : down;
  const int column = threadIdx.x & (across - 1), first = static_cast<int>(threadIdx.x) >> log;
  const int row = across < 32 ? threadIdx.x / 32 : first;
  __syncthreads();
#pragma unroll 1
  for (int base = 0; base < width; base += across * N) {
    const R* from = a.sums + tile * parts * width + base + column * N;
    R sum[N] = {};
#pragma unroll 1
    for (int part = first; part < parts; part += kLoads * down) {
      R some[kLoads][N] = {};
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (part + i * down < parts) load_written(from + int64_t{part + i * down} * width, some[i]);
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] += some[i][j];
    }
    sum_lanes_apart(sum, across);
    if (across >= 32 || threadIdx.x % 32 < across) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums[row * width + base + column * N + j] = sum[j];
    }
  }
  __syncthreads();
  sum_columns(sums, width, height);
}

template <class R>
__device__ void gather_tile(const ForwardArgs<R>& a, int64_t tile, R* sums) {
  if (a.g.width() % 4 == 0)
    gather_columns<4>(a, tile, sums);
  else
    gather_columns<1>(a, tile, sums);
}

// Rates, gates and the share of the loss of `count` groups from `first` on, from their sums over all rows.
template <class R>
__device__ __forceinline__ R finish_groups(const ForwardArgs<R>& a, int64_t first, int count, R weight,
                                           const R* sums, R* shared) {
  const R inverse = R(1) / weight;
  R loss = 0;
#pragma unroll 1
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    const int64_t group = first + c;
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
  if (a.clamp != Clamp::batch && first == 0 && threadIdx.x == 0) a.gate[0] = inverse;
  return block_sum(shared, loss);
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
    for (int64_t b = begin + threadIdx.x / 32; b < end; b += blockDim.x / 32) {
      R row = 0;
      for (int64_t tile = threadIdx.x % 32; tile < a.g.tiles; tile += 32)
        row += __ldcg(a.row_values + b * a.g.tiles + tile);
      row = lane_sum(row, 32);
      if (threadIdx.x % 32 == 0) a.kl[b] = row;
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

// The loss from the sum over tiles, blocks or row sets, by one thread.
template <class R>
__device__ __forceinline__ void store_loss(const ForwardArgs<R>& a, R sum, R weight) {
  if (!a.has_loss() || threadIdx.x != 0) return;
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

// The same from the shares in `losses`.
template <class R>
__device__ __forceinline__ void finish_loss(const ForwardArgs<R>& a, R* shared) {
  if (!a.has_loss()) return;
  const R sum = sum_of(a.losses, a.loss_count(), shared);
  const R weight = total_weight(a, 0, shared);
  store_loss(a, sum, weight);
}

// Finishes everything where ForwardArgs::few_sums: a warp adds up a group.
template <class R>
__device__ __forceinline__ void complete_few(const ForwardArgs<R>& a, R* sums) {
  const int width = a.g.width(), parts = a.g.parts(), groups = static_cast<int>(a.g.tiles) * width;
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const R* from = a.sums + group / width * parts * width + group % width;
    R sum = 0;
#pragma unroll 4
    for (int part = threadIdx.x % 32; part < parts; part += 32) sum += __ldcg(from + part * width);
    sum = lane_sum(sum, 32);
    if (threadIdx.x % 32 == 0) sums[group] = sum;
  }
  __syncthreads();
  R* behind = sums + groups;
  const R weight = total_weight(a, 0, behind);
  store_loss(a, finish_groups(a, 0, groups, weight, sums, behind), weight);
}

// Finishes a tile whose parts are all there, in sums[0 .. width) or (`gather`) in scratch memory, and then,
// if arrive() says that nothing else is missing, the loss.
template <class R, class Arrive>
__device__ __forceinline__ void complete_tile(const ForwardArgs<R>& a, int64_t tile, bool gather, R* sums,
                                              const Arrive& arrive) {
  const int width = a.g.width();
  R* behind = sums + width;  // for block_sum, which must not overwrite the sums
  if (gather) gather_tile(a, tile, sums);
  const R weight = total_weight(a, tile, behind);
  const R share = finish_groups(a, tile * width, width, weight, sums, behind);
  if (a.one_tile()) return store_loss(a, share, weight);
  if (a.clamp != Clamp::sample && threadIdx.x == 0) a.losses[tile] = share;
  if (arrive()) {
    __syncthreads();
    finish_loss(a, behind);
  }
}

// Called once a block has its sums in sums[0 .. width): writes them to scratch memory where other blocks work
// on the same tile, and finishes the tile, the rows and the loss where this block is the last one that they
// waited for. `clamped`: this thread's share of a loss of clamped elements. kCells: whether single cells may
// matter (Geometry::cells); without them 48 registers are enough.
template <bool kCells, class R>
__device__ __forceinline__ void finish_block(const ForwardArgs<R>& a, int64_t tile, int part, R clamped,
                                             int* flag, R* sums) {
  const int width = a.g.width(), parts = a.g.parts();
  const int64_t block = tile * parts + part;
  const bool counting = a.counters != nullptr;
  R* behind = sums + width;  // for block_sum, which must not overwrite the sums
  if (parts > 1) {
#pragma unroll 1
    for (int c = threadIdx.x; c < width; c += blockDim.x) a.sums[block * width + c] = sums[c];
    if (a.weight != nullptr) {
      const R weight = part_weight(a, part, behind);
      if (threadIdx.x == 0) a.weights[block] = weight;
    }
  }
  if (a.few_sums()) {
    if (counting && block_arrives_last(a.counters, static_cast<unsigned>(a.g.tiles * parts), flag))
      complete_few(a, sums);
    return;
  }
  if (kCells && a.clamps_at_once()) {
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
  if (parts == 1 ||
      (counting && block_arrives_last(a.counters + kTileCounters + tile, static_cast<unsigned>(parts), flag)))
    return complete_tile(a, tile, parts > 1, sums, [&] {
      return (counting && block_arrives_last(a.counters, static_cast<unsigned>(a.arrivals()), flag)) || last;
    });
  if (last) {
    __syncthreads();
    finish_loss(a, behind);
  }
}

// Adds up the block's threads: sums[0 .. width) are, by column or (row) one number for each group, the sums
// of their numbers. Within a warp by a butterfly, then the warps in their order. Ends with a barrier.
template <Tiling kTiling, int kSums, class R>
__device__ __forceinline__ void sum_threads(const Geometry& g, R (&sum)[kSums], R* sums) {
  const int width = g.width(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if constexpr (kTiling == Tiling::column) {
    sum_lanes_apart(sum, g.tx());
    if (lane < g.tx()) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) sums[warp * width + lane * kSums + j] = sum[j];
    }
    __syncthreads();
    sum_columns(sums, width, g.threads() / 32);
  } else {
    // A group is ty's; its threads are tx in a row, in one warp or in several, for each of tz batch rows.
    const int row = g.log_tx + g.log_ty, pieces = g.log_tx > 5 ? 1 << (g.log_tx - 5) : 1;
    sum[0] = lane_sum(sum[0], min(g.tx(), 32));
    sum_lanes_apart(sum, 1 << min(row, 5));
    const bool narrow = row < 5;  // several batch rows in a warp
    const int place = narrow ? warp * width + (lane >> g.log_tx) : threadIdx.x >> min(g.log_tx, 5);
    R* matrix = sums + width;
    if (lane % min(g.tx(), 32) == 0 && (!narrow || lane < 1 << row)) matrix[place] = sum[0];
    __syncthreads();
    const int rows = narrow ? g.threads() / 32 : g.tz();
#pragma unroll 1
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
      R total = 0;
#pragma unroll 1
      for (int z = 0; z < rows; ++z)
#pragma unroll 4
        for (int piece = 0; piece < pieces; ++piece) total += matrix[(z * width + c) * pieces + piece];
      sums[c] = total;
    }
    __syncthreads();
  }
}

// The end of a block's work: adds up its threads' sums, writes the block's partial sums and finishes what
// they complete.
template <Tiling kTiling, bool kCells, int kSums, class R>
__device__ __forceinline__ void write_partials(const ForwardArgs<R>& a, const ThreadOffsets& p,
                                               R (&sum)[kSums], R clamped, unsigned char* shared) {
  R* sums = reinterpret_cast<R*>(shared + kFlagBytes);
  sum_threads<kTiling>(a.g, sum, sums);
  finish_block<kCells>(a, p.tile, p.part, clamped, reinterpret_cast<int*>(shared), sums);
}

// Does for a captured launch what the last blocks do in other launches, with as many threads: a block for
// each tile and each set of rows that is not complete yet, the last of which computes the loss; or one block
// for the loss alone.
template <class R>
__global__ void __launch_bounds__(1024) finish_kernel(const __grid_constant__ ForwardArgs<R> a) {
  VK_SHARED(shared);
  int* flag = reinterpret_cast<int*>(shared);
  R* sums = reinterpret_cast<R*>(shared + kFlagBytes);
  const int64_t tiles = a.open_tiles(), block = blockIdx.x;
  const auto last = [&] { return gridDim.x == 1 || block_arrives_last(a.finished, gridDim.x, flag); };
  if (a.few_sums()) return complete_few(a, sums);
  if (block < tiles) return complete_tile(a, block, true, sums, last);
  if (block < tiles + a.open_sets()) {
    const R share = finish_rows(a, block - tiles, sums);
    if (a.clamps_cells() && threadIdx.x == 0) a.losses[block - tiles] = share;
  }
  if (last()) {
    __syncthreads();
    finish_loss(a, sums);
  }
}

}  // namespace vk::cuda
