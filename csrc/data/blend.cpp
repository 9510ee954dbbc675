// The period table of a blend (megapre/data/blend.py): plain C functions without torch, called through ctypes.
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace {

struct Seat {
  int64_t due;
  int32_t source;
  bool operator>(const Seat& other) const { return due != other.due ? due > other.due : source > other.source; }
};

// A binary heap whose first element is due first; ties go to the lower source.
struct Heap {
  std::vector<Seat> seats;
  void push(Seat seat) {
    std::size_t at = seats.size();
    seats.push_back(seat);
    while (at && seats[(at - 1) / 2] > seat) {
      seats[at] = seats[(at - 1) / 2];
      at = (at - 1) / 2;
    }
    seats[at] = seat;
  }
  Seat pop() {
    const Seat first = seats.front(), last = seats.back();
    seats.pop_back();
    const std::size_t size = seats.size();
    for (std::size_t at = 0, child; size; at = child) {
      child = 2 * at + 1;
      if (child + 1 < size && seats[child] > seats[child + 1]) ++child;
      if (child >= size || !(last > seats[child])) {
        seats[at] = last;
        break;
      }
      seats[at] = seats[child];
    }
    return first;
  }
};

}  // namespace

extern "C" {

// Tijdeman's chairman assignment. Seat j (from 1) of source i opens at slot ceil(((j-1) q + 1) P / (c q)) and is due by
// floor((j q - 1) P / (c q)), q = 2k - 2, c = counts[i], P their sum, slots from 1; each takes the open seat that is due
// first.
// sources, ranks: int32 [P], the source of each slot and its rank among that source's slots. Returns 0; 1 without
// memory, 2 on counts that cannot be seated.
__attribute__((visibility("default"))) int megapre_chairman(const int64_t* counts, int64_t k, int64_t period,
                                                            int32_t* sources, int32_t* ranks) {
  try {
    const int64_t parts = 2 * k - 2;
    // Sources whose next seat opens at a slot: lists linked through `next`.
    std::vector<int32_t> first(period, -1), next(k, -1);
    std::vector<int64_t> seat(k, 1);
    std::vector<int32_t> taken(k, 0);
    for (int64_t i = k - 1; i >= 0; --i) {
      const int64_t opens = (period + counts[i] * parts - 1) / (counts[i] * parts) - 1;
      if (opens < period) {
        next[i] = first[opens];
        first[opens] = static_cast<int32_t>(i);
      }
    }
    Heap open;
    open.seats.reserve(k);
    for (int64_t slot = 0; slot < period; ++slot) {
      for (int32_t i = first[slot]; i >= 0;) {
        const int32_t following = next[i];
        open.push({((seat[i] * parts - 1) * period) / (counts[i] * parts), i});
        i = following;
      }
      if (open.seats.empty()) return 2;
      const Seat chosen = open.pop();
      const int32_t i = chosen.source;
      sources[slot] = i;
      ranks[slot] = taken[i]++;
      if (++seat[i] <= counts[i]) {
        const int64_t numerator = ((seat[i] - 1) * parts + 1) * period, divisor = counts[i] * parts;
        int64_t opens = (numerator + divisor - 1) / divisor - 1;
        if (opens <= slot) opens = slot + 1;  // open already; it is due later than the seat just taken
        if (opens < period) {
          next[i] = first[opens];
          first[opens] = i;
        }
      }
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
}
