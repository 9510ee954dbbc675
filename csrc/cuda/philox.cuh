// Philox4x32-10 (Salmon et al., SC'11) on the device; the definition is megapre/random/philox.py.
#pragma once
#include <stdint.h>

__device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int r = 0; r < 10; r++) {
    const uint32_t h0 = __umulhi(c.x, 0xD2511F53u), l0 = c.x * 0xD2511F53u;
    const uint32_t h1 = __umulhi(c.z, 0xCD9E8D57u), l1 = c.z * 0xCD9E8D57u;
    c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0);
    k.x += 0x9E3779B9u;
    k.y += 0xBB67AE85u;
  }
  return c;
}
