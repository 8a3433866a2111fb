// The parameter of a forward kernel.
#pragma once

#include "launch.cuh"

namespace vk::cuda {

static_assert(1 + kReducingBlocks <= kTileCounters && kTileCounters + kReducingBlocks / 2 <= kCounters);

template <class R>
struct ForwardArgs {
  Geometry g;
  int64_t rows, groups, numel;  // rows: of the batch
  int K;
  int block_samples;      // of the K, those that a block draws; the blocks of the first ones compute the KL
  uint32_t sample_quads;  // for plain kernels, whose blocks draw one: quads of z in a sample
  Source mu, scale, prior_mu, prior_scale, z;
  Stride32 in, prior_in, quads;  // for plain kernels, of mu and the scale, of the prior, and of z in quads
  Bounds<R> bounds;
  LogVariance log_variance;
  Keys keys;
  DType dtype;
  Param param;
  Clamp clamp;
  Penalty penalty;
  Reduction reduction;
  bool group_sums, kl_wide;
  bool special;           // for plain kernels: scales are adjusted, or batch rows are weighted
  R slope;                // of the logarithm of sd, for the parameterizations that hold it
  R free_bits, row_size;  // row_size: latent elements of a batch row

  int64_t* rng_out;
  R *kl, *kl_per_group, *gate;
  uint8_t* open;
  const R *weight, *free_bits_per_group;

  // Scratch memory, each part present only where it is needed.
  R* sums;         // [tile, part, width] weighted sums of the KL
  R* weights;      // [tile, part] sums of weights
  R* losses;       // one for each tile, block or set of rows: what the loss is added up from
  R* row_values;   // [row, tile] clamped values of rows that several tiles share
  R* cells;        // [row, group, split]
  uint8_t* masks;  // [row, vector] open bits that no byte of `open` can take directly

  unsigned* counters;  // null: a second kernel finishes the sums, and its blocks count in `finished`
  unsigned* finished;  // in scratch memory

  __host__ __device__ bool one_block() const { return g.tiles == 1 && g.parts() == 1; }
  // Whether the one tile's share is the loss, and nothing else is left to finish.
  __host__ __device__ bool one_tile() const {
    return g.tiles == 1 && clamp != Clamp::sample && !finishes_rows();
  }
  // Whether the last block of all adds up the sums of all tiles, rather than the last block of each tile
  // those of the tile: one arrival is waited for in place of two, which takes 1 us less.
  __host__ __device__ bool few_sums() const {
    return g.tiling == Tiling::row && g.tiles > 1 && g.parts() > 1 && clamp != Clamp::sample &&
           !finishes_rows() && g.tiles * g.width() <= 32 && g.tiles * g.parts() * g.width() <= 4096;
  }
  __host__ __device__ bool has_loss() const {
    return reduction != Reduction::none && reduction != Reduction::elementwise;
  }
  // Whether the block that computes a cell clamps it, too.
  __host__ __device__ bool clamps_at_once() const {
    return (g.cells == Cells::elements || g.cells == Cells::sums) && clamp == Clamp::sample;
  }
  __host__ __device__ bool clamps_cells() const {
    return g.cells == Cells::scratch && clamp == Clamp::sample;
  }
  // What the loss is added up from.
  __host__ __device__ int64_t loss_count() const {
    return clamps_at_once() ? g.tiles * g.parts() : (clamps_cells() ? g.row_sets() : g.tiles);
  }
  // Sets of rows are finished only when all the blocks that write to them are done.
  __host__ __device__ bool finishes_rows() const {
    return g.cells == Cells::scratch || row_values != nullptr || masks != nullptr;
  }
  __host__ __device__ int64_t row_writers() const { return g.folded ? g.tiles : g.tiles * g.splits; }
  // How many tiles and sets announce that they are finished. Tiles of several parts are at most half of
  // kReducingBlocks, sets at most all of it.
  __host__ __device__ int64_t arrivals() const { return g.tiles + (finishes_rows() ? g.row_sets() : 0); }
  // What the first kernel leaves unfinished when it may not count.
  __host__ __device__ int64_t open_tiles() const { return g.parts() > 1 ? g.tiles : 0; }
  __host__ __device__ int64_t open_sets() const {
    return finishes_rows() && row_writers() > 1 ? g.row_sets() : 0;
  }
};

// By one thread of the launch: writes the random state that was drawn with, and makes the counter of the
// kernel that follows 0.
template <class R>
__device__ __forceinline__ void store_state(const ForwardArgs<R>& a) {
  if (threadIdx.x != 0 || blockIdx.x != 0 || blockIdx.y != 0 || blockIdx.z != 0) return;
  if (a.finished != nullptr) *a.finished = 0;
  if (a.rng_out == nullptr) return;
  a.rng_out[0] = static_cast<int64_t>(a.keys.state.read_seed());
  a.rng_out[1] = static_cast<int64_t>(a.keys.state.read_offset());
}

// Launches the kernels of plain.cuh.
void forward_plain(const ForwardArgs<float>& a, bool has_kl, bool sample, cudaStream_t stream);

// Shared memory of a block that reduces: a flag, then numbers.
inline constexpr int kFlagBytes = 16;

// For blocks whose threads hold `sums` numbers each.
template <class R>
size_t reduction_bytes(const Geometry& g, int sums) {
  int numbers = std::max(g.threads() * std::max(sums, 4), g.width() + g.threads());
  if (g.cells == Cells::scratch || g.cells == Cells::sums) numbers += g.width();
  return kFlagBytes + static_cast<size_t>(numbers) * sizeof(R);
}

}  // namespace vk::cuda
