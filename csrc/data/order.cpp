// The keyed permutation of windows (megapre/data/order.py) and the search for documents in a mapped index
// (megapre/data/indexed.py): plain C functions without torch, called through ctypes. Python holds the definitions.
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace {

const uint64_t kGolden = 0x9E3779B97F4A7C15ull;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

inline uint64_t root_up(uint64_t size) {  // isqrt(size - 1) + 1
  uint64_t r = static_cast<uint64_t>(std::sqrt(static_cast<double>(size - 1)));
  while (r * r > size - 1) --r;
  while ((r + 1) * (r + 1) <= size - 1) ++r;
  return r + 1;
}

uint64_t permute(uint64_t index, uint64_t size, uint64_t key) {
  const uint64_t rows = root_up(size), columns = (size + rows - 1) / rows;
  for (;;) {
    uint64_t row = index / columns, column = index % columns;
    for (uint64_t r = 0; r < 8; r += 2) {
      row = (row + mix(column * ((2 * r + 1) * kGolden) + key) % rows) % rows;
      column = (column + mix(row * ((2 * r + 3) * kGolden) + key) % columns) % columns;
    }
    index = row * columns + column;
    if (index < size) return index;
  }
}

uint64_t derive(uint64_t a, uint64_t b) {  // derive_key(a, b)
  const uint64_t first = mix(mix(a + kGolden) + 3 * kGolden);
  return mix(first + mix(b + kGolden) + 3 * kGolden);
}

template <typename T>
T load(const unsigned char* at, int64_t index) {  // the index begins at an odd byte
  T value;
  __builtin_memcpy(&value, at + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT uint64_t megapre_permute(uint64_t index, uint64_t size, uint64_t key) { return permute(index, size, key); }

// Window visited at place `index` of an epoch of `size` windows: permute within the group, make room for the short block,
// permute the blocks.
EXPORT uint64_t megapre_two_level(uint64_t index, uint64_t size, uint64_t key, uint64_t short_slot, uint64_t block,
                                  uint64_t group) {
  const uint64_t g = index / group, begin = g * group, left = size - begin, last = size % block;
  uint64_t place = begin + permute(index - begin, left < group ? left : group, derive(key, g + 1));
  if (last && place >= short_slot * block + last) place += block - last;
  return permute(place / block, (size + block - 1) / block, key) * block + place % block;
}

// Position in its document and number of the document of each token of a row, int64 [length] each, where documents begin
// at `starts`, int64 [count], ascending; the first token begins one in any case.
EXPORT void megapre_mark_documents(const int64_t* starts, int64_t count, int64_t length, int64_t* positions,
                                   int64_t* segments) {
  for (int64_t at = 0, segment = 0, next = 0; at < length; ++segment) {
    while (next < count && starts[next] <= at) ++next;
    const int64_t begin = at, stop = next < count && starts[next] < length ? starts[next] : length;
    for (; at < stop; ++at) {
      positions[at] = at - begin;
      segments[at] = segment;
    }
  }
}

// Boundaries of the documents that begin in tokens [start, stop): int64 out [room]; how many there are, or -1 when a
// record that was touched is damaged, -2 when there are more than `room`. first: int64 [documents + 1], pointers:
// int64 [sequences] in bytes, both unaligned; total in tokens.
EXPORT int64_t megapre_document_starts(const unsigned char* first, const unsigned char* pointers, int64_t documents,
                                       int64_t sequences, int64_t itemsize, int64_t total, int64_t start, int64_t stop,
                                       int64_t* out, int64_t room) {
  bool damaged = false;
  const auto begin = [&](int64_t document) -> int64_t {
    const int64_t sequence = load<int64_t>(first, document);
    if (sequence == sequences) return total;
    if (sequence < 0 || sequence > sequences) {
      damaged = true;
      return total;
    }
    const int64_t at = load<int64_t>(pointers, sequence);
    if (at < 0 || at % itemsize || at / itemsize > total) damaged = true;
    return at / itemsize;
  };
  // Documents are of about equal length: guess, then double the step, which touches fewer pages than halving all.
  int64_t low = 0, high = documents, step = 1;
  const int64_t guess = total ? static_cast<int64_t>(static_cast<double>(documents) * start / total) : 0;
  if (guess < documents && begin(guess) < start) {
    low = guess + 1;
    while (low + step < documents && begin(low + step) < start && !damaged) low += step + 1, step *= 2;
    high = low + step < documents ? low + step : documents;
  } else if (guess < documents) {
    high = guess;
    while (high - step >= 0 && begin(high - step) >= start && !damaged) high -= step, step *= 2;
    low = high - step < 0 ? 0 : high - step;
  }
  while (low < high && !damaged) {
    const int64_t middle = low + (high - low) / 2;
    if (begin(middle) < start)
      low = middle + 1;
    else
      high = middle;
  }
  int64_t found = 0, last = start;
  for (; low < documents && !damaged; ++low) {
    const int64_t at = begin(low);
    if (damaged || at < last) return -1;
    if (at >= stop) break;
    if (found == room) return -2;
    out[found++] = last = at;
  }
  return damaged ? -1 : found;
}
}
