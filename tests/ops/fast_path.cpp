// Which problems the CUDA kernels' fast paths take: prints a line for each of a list of them. Run by
// test_fast_path.py.
#include <cstdio>

#include "cuda/geometry.h"

namespace {

using vk::Strides;

alignas(16) char memory[64];

struct Case {
  const char* name;
  vk::DType dtype;
  int64_t B, G, S;
  Strides mu, scale;
  bool groups_inner = false;
  int misaligned = 0;  // bytes
  bool kl = true, sample = true;
  vk::Param param = vk::Param::logvar;
  vk::Clamp clamp = vk::Clamp::batch;
  int64_t K = 1;
  bool weighted = false;
};

void print(const Case& c) {
  vk::Problem p;
  p.B = c.B;
  p.G = c.G;
  p.S = c.S;
  p.K = c.K;
  p.groups_inner = c.groups_inner;
  p.dtype = c.dtype;
  p.param = c.param;
  p.clamp = c.clamp;
  p.weight = c.weighted ? memory : nullptr;
  const char* data = memory + c.misaligned;
  vk::cuda::Axes mu = vk::cuda::axes_of(vk::Input{data, c.mu}, p);
  vk::cuda::Axes scale = vk::cuda::axes_of(vk::Input{memory, c.scale}, p);
  const vk::cuda::Purpose purpose{c.kl, c.sample, true, true, memory};
  const vk::cuda::Geometry g = geometry_of(p, purpose, vk::cuda::Tensors<2>{{&mu, &scale}});
  std::printf("%s: %s %s\n", c.name, g.plain ? "plain" : "general",
              g.tiling == vk::cuda::Tiling::column ? "column" : "row");
}

}  // namespace

int main() {
  const auto f32 = vk::DType::f32, bf16 = vk::DType::bf16, f64 = vk::DType::f64;
  const auto dense = [](int64_t G, int64_t S) { return Strides{G * S, S, 1}; };
  const auto inner = [](int64_t G, int64_t S) { return Strides{G * S, 1, G}; };
  const Case cases[] = {
      {"[1024,128] f32", f32, 1024, 128, 1, dense(128, 1), dense(128, 1)},
      {"[1024,4] f32", f32, 1024, 4, 1, dense(4, 1), dense(4, 1)},
      {"[1024,6] f32", f32, 1024, 6, 1, dense(6, 1), dense(6, 1)},
      {"[1024,8] bf16", bf16, 1024, 8, 1, dense(8, 1), dense(8, 1)},
      {"[1024,4] bf16", bf16, 1024, 4, 1, dense(4, 1), dense(4, 1)},
      {"[1024,128] f64", f64, 1024, 128, 1, dense(128, 1), dense(128, 1)},
      {"packed [1024,2*4] f32", f32, 1024, 4, 1, {8, 1, 1}, {8, 1, 1}},
      {"packed [1024,2*8] bf16", bf16, 1024, 8, 1, {16, 1, 1}, {16, 1, 1}},
      {"packed [1024,2*4] bf16", bf16, 1024, 4, 1, {8, 1, 1}, {8, 1, 1}},
      {"packed [64,2*4,64,64] bf16", bf16, 64, 4, 4096, {8 * 4096, 4096, 1}, {8 * 4096, 4096, 1}},
      {"[64,4,7,7] f32", f32, 64, 4, 49, dense(4, 49), dense(4, 49)},
      {"channels_last [8,16,32,32] bf16", bf16, 8, 16, 1024, inner(16, 1024), inner(16, 1024), true},
      {"packed channels_last [8,2*8,32,32] bf16", bf16, 8, 8, 1024, {16384, 1, 16}, {16384, 1, 16}, true},
      {"one group [64,4096] f32", f32, 64, 1, 4096, dense(1, 4096), dense(1, 4096)},
      {"z alone, one long row", f32, 1000, 1, 100, dense(1, 100), dense(1, 100), false, 0, false},
      {"KL alone", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, false},
      {"misaligned mu", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 4},
      {"mu and scale differently strided", f32, 1024, 128, 1, dense(128, 1), {256, 1, 1}},
      {"expanded over the batch", f32, 1024, 128, 1, {0, 1, 1}, {0, 1, 1}},
      {"every other column", f32, 1024, 128, 1, {256, 2, 1}, {256, 2, 1}},
      {"weights", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, true, vk::Param::logvar,
       vk::Clamp::batch, 1, true},
      {"log_std", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, true, vk::Param::log_std},
      {"std", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, true, vk::Param::std},
      {"clamp by sample", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, true,
       vk::Param::logvar, vk::Clamp::sample},
      {"two samples", f32, 1024, 128, 1, dense(128, 1), dense(128, 1), false, 0, true, true,
       vk::Param::logvar, vk::Clamp::batch, 2},
      {"two samples, too large to be read twice", f32, 8192, 512, 1, dense(512, 1), dense(512, 1), false, 0,
       true, true, vk::Param::logvar, vk::Clamp::batch, 2},
      {"[2^24-1,1024] bf16", bf16, (1 << 24) - 1, 1024, 1, dense(1024, 1), dense(1024, 1)},
      {"[2^24,1024] bf16", bf16, 1 << 24, 1024, 1, dense(1024, 1), dense(1024, 1)},
  };
  for (const Case& c : cases) print(c);
  return 0;
}
