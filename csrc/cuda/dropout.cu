// The keep mask of one dropout site: bytes [positions, samples, features], four features a thread.
// Not yet executed on a GPU.
#include "common.cuh"
#include "philox.cuh"

namespace {

__global__ void keep_mask(uint8_t* out, const int64_t* positions, const int64_t* samples, int64_t B, int64_t features,
                          int64_t groups, int64_t total, uint32_t key, uint32_t step, uint32_t site,
                          uint32_t threshold) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
    const int64_t row = i / groups, group = i % groups;
    const uint64_t sample = (uint64_t)samples[row % B];
    const uint4 c = make_uint4((uint32_t)sample, (uint32_t)positions[row / B], (uint32_t)group, site);
    const uint4 w = philox(c, make_uint2(key ^ (uint32_t)(sample >> 32), step));
    const uint32_t word[4] = {w.x, w.y, w.z, w.w};
    uint8_t* to = out + row * features + 4 * group;
    if (features % 4 == 0) {
      *(uchar4*)to = make_uchar4(w.x >= threshold, w.y >= threshold, w.z >= threshold, w.w >= threshold);
    } else {
      for (int lane = 0; lane < 4 && 4 * group + lane < features; lane++) to[lane] = word[lane] >= threshold;
    }
  }
}

}  // namespace

MEGAPRE_EXPORT int megapre_keep_mask(void* out, const void* positions, const void* samples, int64_t P, int64_t B,
                                     int64_t features, uint32_t key, uint32_t step, uint32_t site, uint32_t threshold,
                                     void* stream) {
  const int64_t groups = (features + 3) / 4, total = P * B * groups;
  if (total == 0) return 0;
  const int64_t blocks = ceil_div(total, 256);
  LAUNCH(keep_mask, dim3((unsigned)(blocks < 65536 ? blocks : 65536)), dim3(256), 0, (cudaStream_t)stream, (uint8_t*)out,
         (const int64_t*)positions, (const int64_t*)samples, B, features, groups, total, key, step, site, threshold);
  return (int)cudaGetLastError();
}
