// Bytes that kernels read and write in chosen tensors: the functions that gcc calls at every access under
// -fsanitize=thread, in place of ThreadSanitizer's. benchmarks/kernels/traffic.py reads the sums.
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Span {
  uintptr_t first, last;
  int64_t read, written;
};

Span spans[16];
int span_count = 0;

void count(void* at, int64_t bytes, bool write) {
  const uintptr_t place = (uintptr_t)at;
  for (int i = 0; i < span_count; i++)
    if (place >= spans[i].first && place < spans[i].last) (write ? spans[i].written : spans[i].read) += bytes;
}

}  // namespace

// Forget all tensors, or watch one more.
EXPORT void simt_watch(void* at, int64_t bytes) {
  if (!at) span_count = 0;
  else spans[span_count++] = {(uintptr_t)at, (uintptr_t)at + bytes, 0, 0};
}
EXPORT int64_t simt_read(int tensor) { return spans[tensor].read; }
EXPORT int64_t simt_written(int tensor) { return spans[tensor].written; }

#define ACCESS(size)                                                       \
  EXPORT void __tsan_read##size(void* at) { count(at, size, false); }      \
  EXPORT void __tsan_write##size(void* at) { count(at, size, true); }      \
  EXPORT void __tsan_unaligned_read##size(void* at) { count(at, size, false); } \
  EXPORT void __tsan_unaligned_write##size(void* at) { count(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
EXPORT void __tsan_read_range(void* at, uintptr_t bytes) { count(at, (int64_t)bytes, false); }
EXPORT void __tsan_write_range(void* at, uintptr_t bytes) { count(at, (int64_t)bytes, true); }
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
EXPORT void __tsan_init() {}
