// The SIMT tier: CUDA kernels on a CPU, for verification. One fiber per CUDA thread, blocks one after another, barriers
// and warp collectives real, shared memory filled with NaN, fibers run in a chosen order.
//
// A fiber runs until it meets a barrier, a collective or its end; a warp runs as far ahead of the others as barriers
// allow, which is the worst that the hardware may do to code that lacks one. This file is compiled without sanitizers:
// under TSan only what a kernel does is watched, fibers are switched without synchronisation and only __syncthreads and
// __syncwarp make an order (a shuffle makes none, as in PTX). Blocks of one launch are not ordered either: their stacks
// and shared memory are mapped anew, so a race between blocks on global memory is seen too.
#include <sys/mman.h>

#include "fibers.h"

namespace simt {
namespace {

// Release every complete collective of a warp; whether there was one.
bool release_warp(int warp) {
  const int count = (int)engine.fibers.size(), base = warp * 32;
  bool any = false;
  for (int lane = 0; lane < 32 && base + lane < count; lane++) {
    Fiber& fiber = engine.fibers[base + lane];
    if (fiber.state != AT_WARP) continue;
    bool complete = true;
    for (int k = 0; k < 32; k++) {
      if (!(fiber.mask >> k & 1)) continue;
      if (base + k >= count) return record("a mask names a lane outside the block", fiber.line), false;
      const Fiber& other = engine.fibers[base + k];
      if (other.state != AT_WARP) complete = false;
      else if (other.mask != fiber.mask || other.line != fiber.line)
        return record("lanes of one mask meet at different collectives", fiber.line), false;
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    for (int k = 0; k < 32; k++)
      if (mask >> k & 1) engine.fibers[base + k].state = READY;
    any = true;
  }
  return any;
}

// Run one warp until every lane waits, at most `budget` rounds; whether anything ran.
bool run_warp(int warp, std::vector<int>& lanes, int budget) {
  const int count = (int)engine.fibers.size();
  bool any = false;
  for (bool more = true; more && budget > 0 && !engine.error; budget--) {
    more = false;
    if (engine.order == 2) std::shuffle(lanes.begin(), lanes.end(), engine.random);
    for (int lane : lanes) {
      const int i = warp * 32 + lane;
      if (i >= count || engine.fibers[i].state != READY) continue;
      resume(engine.fibers[i]);
      if (engine.error) return true;
      more = any = true;
    }
    if (release_warp(warp)) more = any = true;
  }
  return any;
}

bool release_block() {
  const int line = engine.fibers[0].line;
  for (const Fiber& fiber : engine.fibers)
    if (fiber.state != AT_BLOCK) return false;
  for (const Fiber& fiber : engine.fibers)
    if (fiber.line != line) return record("threads at different __syncthreads", fiber.line), false;
  for (Fiber& fiber : engine.fibers) fiber.state = READY;
  return true;
}

void run_block() {
  const int warps = (int)engine.slots.size();
  std::vector<int> order(warps), lanes(32);
  for (int i = 0; i < warps; i++) order[i] = engine.order == 1 ? warps - 1 - i : i;
  for (int i = 0; i < 32; i++) lanes[i] = engine.order == 1 ? 31 - i : i;
  while (!engine.error) {
    bool any = false;
    if (engine.order == 2) std::shuffle(order.begin(), order.end(), engine.random);
    for (int warp : order) {
      any |= run_warp(warp, lanes, engine.order == 2 ? 1 + (int)(engine.random() % 32) : 1 << 30);
      if (engine.error) return;
    }
    bool ended = true;
    for (const Fiber& fiber : engine.fibers) ended &= fiber.state == DONE;
    if (ended) return;
    if (release_block()) any = true;
    if (!any) record("deadlock: a barrier that not every thread reaches", engine.fibers[0].line);
  }
}

void map_arena(size_t bytes) {
#if !defined(SIMT_TSAN)
  if (bytes <= engine.arena_bytes) return;
#endif
  if (engine.arena) munmap(engine.arena, engine.arena_bytes);
  engine.arena = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (engine.arena == MAP_FAILED) abort();
  engine.arena_bytes = bytes;
}

// Shared memory of `bytes`, NaN-filled. Under ASan from the heap, whose red zones show an access past its end.
char* take(size_t bytes) {
#if defined(SIMT_ASAN)
  char* memory = (char*)malloc(bytes);
#else
  engine.used = (engine.used + 127) & ~(size_t)127;
  char* memory = engine.arena + engine.used;
  engine.used += bytes;
  if (engine.used > engine.arena_bytes) abort();
#endif
  for (size_t i = 0; i < bytes; i++) ((volatile char*)memory)[i] = (char)0xFF;
  return memory;
}

void give_back() {
#if defined(SIMT_ASAN)
  free(engine.dynamic);
  for (int i = 0; i < engine.static_count; i++) free(engine.statics[i].memory);
#endif
  engine.static_count = 0;
  engine.dynamic = nullptr;
}

const char* refusal(const void* kernel, dim3 grid, dim3 block, size_t dynamic) {
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return "an empty grid or block";
  if ((uint64_t)block.x * block.y * block.z > THREADS || block.z > 64) return "more than 1024 threads in a block";
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return "a grid that is too large";
  const auto found = engine.allowed.find(kernel);
  const size_t allowed = found == engine.allowed.end() ? DEFAULT_DYNAMIC : (size_t)found->second;
  if (dynamic > allowed) return "more dynamic shared memory than the kernel was allowed";
  return nullptr;
}

}  // namespace

Current current;

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic, void (*body)(void*), void* data) {
  if (engine.error) return;
  engine.name = name, engine.body = body, engine.data = data;
  engine.fibers.clear();
  if (const char* why = refusal(kernel, grid, block, dynamic)) {
    record(why, 0);
    engine.error = cudaErrorInvalidConfiguration;
    return;
  }
  const int count = (int)(block.x * block.y * block.z);
  const unsigned blocks = grid.x * grid.y * grid.z;
  engine.fibers.resize(count);
  engine.slots.resize((count + 31) / 32);
  engine.copies.resize((size_t)PENDING * count);
  current.block_size = block, current.grid_size = grid;
#if defined(SIMT_TSAN)
  engine.tsan_main = __tsan_get_current_fiber();
#endif
  std::vector<unsigned> sequence(blocks);
  for (unsigned i = 0; i < blocks; i++) sequence[i] = engine.order == 1 ? blocks - 1 - i : i;
  if (engine.order == 2) std::shuffle(sequence.begin(), sequence.end(), engine.random);
  for (unsigned number : sequence) {
    current.block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    engine.turn ^= 1;
    map_arena(STACK * count + (256 << 10) + 128);
    engine.used = STACK * count;
    engine.dynamic_bytes = dynamic;
    engine.dynamic = take(dynamic);
    for (int i = 0; i < count; i++) prepare(engine.fibers[i], i, block);
    release(&engine.block_start);
    run_block();
    give_back();
    if (engine.error) break;
  }
  acquire(&engine.launch_end);  // a launch ends before the next on its stream begins
  engine.running = nullptr;
}

void* dynamic_shared() { return engine.dynamic; }

void* static_shared(const void* site, size_t bytes) {
  for (int i = 0; i < engine.static_count; i++)
    if (engine.statics[i].site == site) return engine.statics[i].memory;
  if (engine.static_count == 32) fail("more than 32 shared arrays", 0);
  char* memory = take(bytes);
  engine.statics[engine.static_count++] = {site, memory};
  return memory;
}

void fail(const char* what, int line) {
  record(what, line);
  yield();
  abort();
}

void sync_block(int line) {
  Fiber* me = engine.running;
  char* barrier = &engine.block_barrier[engine.turn][me->block_syncs++ & 1];
  me->state = AT_BLOCK, me->line = line;
  release(barrier);
  yield();
  acquire(barrier);
}

void sync_warp(unsigned mask, int line) {
  Fiber* me = engine.running;
  if (!(mask >> me->lane & 1)) fail("the calling lane is not in the mask", line);
  char* barrier = &engine.warp_barrier[engine.turn][me->warp_syncs++ & 1][me->warp];
  me->state = AT_WARP, me->line = line, me->mask = mask;
  release(barrier);
  yield();
  acquire(barrier);
}

// Double buffered, so that one meeting is enough.
const unsigned char* exchange(unsigned mask, const void* value, size_t bytes, int line) {
  Fiber* me = engine.running;
  if (!(mask >> me->lane & 1)) fail("the calling lane is not in the mask", line);
  Slots& slots = engine.slots[me->warp];
  const int parity = me->exchanges++ & 1;
  for (size_t i = 0; i < bytes && i < 16; i++)
    ((volatile unsigned char*)slots.slot[parity][me->lane])[i] = ((const volatile unsigned char*)value)[i];
  me->state = AT_WARP, me->line = line, me->mask = mask;
  yield();
  return slots.slot[parity][0];
}

void pending_add(void* to, const void* from, int bytes) {
  Fiber* me = engine.running;
  if (me->last == PENDING) fail("more cp.async in flight than the tier holds", me->line);
  me->pending[me->last++] = {to, from, bytes, me->group};
}

void pending_commit() { engine.running->group++; }

bool pending_take(int groups, void** to, const void** from, int* bytes) {
  Fiber* me = engine.running;
  if (me->first == me->last) {
    me->first = me->last = 0;
    return false;
  }
  const Copy& copy = me->pending[me->first];
  if (copy.group >= me->group - groups) return false;
  *to = copy.to, *from = copy.from, *bytes = copy.bytes;
  me->first++;
  return true;
}

bool copies_land_early() { return engine.early; }
int last_error() { return engine.error; }
int device_limit() { return engine.limit; }

int allow_dynamic(const void* kernel, int bytes) {
  if (bytes > engine.limit) return cudaErrorInvalidConfiguration;
  engine.allowed[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace simt

#define EXPORT extern "C" __attribute__((visibility("default")))

// order: 0 forward, 1 reverse, 2 random; early: cp.async lands when issued, else when waited for; limit: bytes of
// dynamic shared memory a block may ask for.
EXPORT void simt_configure(int order, unsigned seed, int early, int limit) {
  simt::engine.order = order, simt::engine.early = early, simt::engine.limit = limit;
  simt::engine.random.seed(seed);
  simt::engine.allowed.clear();
}

// The failure since the last call, or "".
EXPORT const char* simt_take_error() {
  static char copy[sizeof simt::engine.message];
  memcpy(copy, simt::engine.message, sizeof copy);
  simt::engine.message[0] = 0;
  simt::engine.error = 0;
  return copy;
}
