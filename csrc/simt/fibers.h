// Fibers of the SIMT tier, one per CUDA thread: their state, the switch between them and the scheduler, and the failure
// that the first of them meets. Included by engine.cpp alone.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

// Under TSan small, since every block gets fresh ones, whose shadow is cleared.
#if defined(SIMT_TSAN)
constexpr size_t STACK = 16 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr int PENDING = 2048, DEFAULT_DYNAMIC = 48 << 10, THREADS = 1024;

enum State { READY, AT_WARP, AT_BLOCK, DONE };
const char* const WHERE[] = {"running", "at a warp collective", "at __syncthreads", "exited"};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  State state;
  int line, linear, lane, warp;
  unsigned mask, exchanges, block_syncs, warp_syncs;
  uint3 thread;
  char* stack;
  Copy* pending;
  int first, last, group;  // copies in flight: pending[first, last); the open group's number
#ifdef __x86_64__
  void* sp;
#else
  ucontext_t context;
#endif
  void *tsan, *fake;
};

struct Slots {
  alignas(16) unsigned char slot[2][32][16];
};

struct Shared {
  const void* site;
  char* memory;
};

struct Engine {
  // Settings of simt_configure.
  int order = 0, early = 0, limit = 227 << 10;
  std::mt19937 random{0};
  // The launch.
  const char* name = "";
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  Fiber* running = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Slots> slots;
  std::vector<Copy> copies;
  std::map<const void*, int> allowed;
  // The block's memory: stacks, then shared memory.
  char* arena = nullptr;
  size_t arena_bytes = 0, used = 0, dynamic_bytes = 0;
  char* dynamic = nullptr;
  Shared statics[32];
  int static_count = 0;
  // Addresses that stand for barriers, by parity: a thread ahead must not lend its later accesses to one behind.
  char block_barrier[2][2], warp_barrier[2][2][32], block_start, launch_end;
  int turn = 0;  // the set of fibers and barriers that the block uses
  // Failure.
  int error = 0;
  char message[2048] = "";
#ifdef __x86_64__
  void* main_sp = nullptr;
#else
  ucontext_t main_context;
#endif
  void *tsan_main = nullptr, *fake = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};

Engine engine;

#ifdef __x86_64__
extern "C" void simt_switch(void** from, void* to);
asm(R"(.text
.local simt_switch
.type simt_switch,@function
simt_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");
#endif

void release([[maybe_unused]] char* address) {
#if defined(SIMT_TSAN)
  __tsan_release(address);
#endif
}

void acquire([[maybe_unused]] char* address) {
#if defined(SIMT_TSAN)
  __tsan_acquire(address);
#endif
}

void note(const char* format, ...) {
  const size_t used = strlen(engine.message);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(engine.message + used, sizeof engine.message - used, format, arguments);
  va_end(arguments);
}

// Record the first failure, with where every thread stands; the launch is then given up.
void record(const char* what, int line) {
  if (engine.error) return;
  const uint3 b = current.block;
  engine.error = cudaErrorLaunchFailure;
  note("%s, block (%u, %u, %u): %s, line %d\n", engine.name, b.x, b.y, b.z, what, line);
  int state = -1, at = -1;
  for (const Fiber& fiber : engine.fibers) {
    if (fiber.state != state || fiber.line != at)
      note("  from thread %d: %s, line %d\n", fiber.linear, WHERE[fiber.state], fiber.line);
    state = fiber.state, at = fiber.line;
  }
}

// From a fiber back to the scheduler.
void yield() {
  Fiber* me = engine.running;
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(engine.tsan_main, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(me->state == DONE ? nullptr : &me->fake, engine.main_stack, engine.main_stack_bytes);
#endif
#ifdef __x86_64__
  simt_switch(&me->sp, engine.main_sp);
#else
  swapcontext(&me->context, &engine.main_context);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(me->fake, &engine.main_stack, &engine.main_stack_bytes);
#endif
}

void entry() {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &engine.main_stack, &engine.main_stack_bytes);
#endif
  acquire(&engine.block_start);
  engine.body(engine.data);
  Fiber* me = engine.running;
  me->state = DONE;
  if (me->first != me->last) record("cp.async still in flight when a thread ends", me->line);
  release(&engine.launch_end);
  yield();
  abort();
}

// From the scheduler into a fiber.
void resume(Fiber& fiber) {
  engine.running = &fiber;
  current.thread = fiber.thread;
  current.lane = fiber.lane;
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(&engine.fake, fiber.stack, STACK);
#endif
#ifdef __x86_64__
  simt_switch(&engine.main_sp, fiber.sp);
#else
  swapcontext(&engine.main_context, &fiber.context);
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(engine.fake, nullptr, nullptr);
#endif
}

void prepare(Fiber& fiber, int linear, dim3 block) {
  const unsigned i = (unsigned)linear;
  char* stack = engine.arena + STACK * i;
  Copy* pending = engine.copies.data() + (size_t)PENDING * i;
  fiber = Fiber();
  fiber.state = READY, fiber.linear = linear, fiber.lane = linear % 32, fiber.warp = linear / 32;
  fiber.stack = stack, fiber.pending = pending;
  fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
#ifdef __x86_64__
  void** top = (void**)(stack + STACK - 64);
  *--top = nullptr;
  *--top = (void*)entry;
  for (int k = 0; k < 6; k++) *--top = nullptr;
  fiber.sp = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack, fiber.context.uc_stack.ss_size = STACK, fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
#if defined(SIMT_TSAN)
  // Kept for good, since one takes a millisecond to make. Two sets by turns, each with barriers of its own: nothing
  // orders a block and the next one, so that TSan sees a race between them.
  static std::vector<void*> pools[2];
  std::vector<void*>& pool = pools[engine.turn];
  while (pool.size() < engine.fibers.size()) pool.push_back(__tsan_create_fiber(0));
  fiber.tsan = pool[i];
#endif
}

}  // namespace
}  // namespace simt
