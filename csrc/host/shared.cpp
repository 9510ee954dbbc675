// Collectives between processes of one host through memory that all of them have mapped.
//
// Every rank owns a region: a counter and two slots. A collective is a series of rounds. In round r a rank writes its
// piece into slot r % 2 of its own region, raises its counter, waits for the counters of all others and reads what it
// needs from their slots. Two slots suffice: whoever writes in round r has seen all others post round r - 1, and so
// knows that they have read what they wanted of round r - 2. Each counter has one writer. Sums are taken in the order of
// the ranks, in fp32 for bf16, so every rank gets the same bits whatever the pieces are.
//
// Plain C functions without torch; a thread per axis runs what is posted, in order, and so does whoever waits.

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <deque>
#include <fcntl.h>
#include <limits>
#include <linux/futex.h>
#include <mutex>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;

enum Kind : int { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL };
enum Type : int { BYTES, F32, F64, BF16, I32, I64 };
enum Reduction : int { SUM, MAX, MIN };

constexpr int64_t SIZES[] = {1, 4, 8, 2, 4, 8};
constexpr int64_t LINE = 64;
constexpr int64_t SMALL = 1 << 16;  // bytes up to which every rank reduces an all-reduce for itself
constexpr auto LOOK = std::chrono::milliseconds(200);  // how often a sleeper looks whether its peer lives

struct Counter {
    alignas(LINE) std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;

    bool reached(uint32_t target) const {
        return static_cast<int32_t>(value.load(std::memory_order_acquire) - target) >= 0;
    }
    void raise(uint32_t to) {
        value.store(to, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst))
            syscall(SYS_futex, &value, FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
    }
};

constexpr int64_t HEAD = 4096;  // the counter's page, before the slots
static_assert(sizeof(Counter) <= HEAD, "the counter has a page");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "counters are shared between processes");

struct BFloat16 {
    uint16_t bits;
};

INLINE float wide(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
template <class T>
INLINE T wide(T x) {
    return x;
}
INLINE void narrow(float value, BFloat16& out) {  // to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
template <class T>
INLINE void narrow(T value, T& out) {
    out = value;
}

template <int REDUCTION, class A>
INLINE A reduced(A a, A b) {  // NaN on either side stays
    if (REDUCTION == SUM) return a + b;
    if (REDUCTION == MAX) return a > b || a != a ? a : b;
    return a < b || a != a ? a : b;
}

// out[i] = sources[0][i] + ... + sources[n - 1][i], in that order; `out` may be one of them.
template <int REDUCTION, class T>
INLINE void reduce_as(void* out_, const char* const* sources, int n, int64_t count) {
    using A = decltype(wide(T{}));
    constexpr int64_t BLOCK = 512;
    A sums[BLOCK];
    T* out = static_cast<T*>(out_);
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t length = count - first < BLOCK ? count - first : BLOCK;
        const T* source = reinterpret_cast<const T*>(sources[0]) + first;
        for (int64_t i = 0; i < length; ++i) sums[i] = wide(source[i]);
        for (int rank = 1; rank < n; ++rank) {
            source = reinterpret_cast<const T*>(sources[rank]) + first;
            for (int64_t i = 0; i < length; ++i) sums[i] = reduced<REDUCTION, A>(sums[i], wide(source[i]));
        }
        for (int64_t i = 0; i < length; ++i) narrow(sums[i], out[first + i]);
    }
}

template <class T>
INLINE void reduce_by(int reduction, void* out, const char* const* sources, int n, int64_t count) {
    if (reduction == SUM) reduce_as<SUM, T>(out, sources, n, count);
    if (reduction == MAX) reduce_as<MAX, T>(out, sources, n, count);
    if (reduction == MIN) reduce_as<MIN, T>(out, sources, n, count);
}

CLONES void reduce(int type, int reduction, void* out, const char* const* sources, int n, int64_t count) {
    if (type == F32) reduce_by<float>(reduction, out, sources, n, count);
    if (type == F64) reduce_by<double>(reduction, out, sources, n, count);
    if (type == BF16) reduce_by<BFloat16>(reduction, out, sources, n, count);
    if (type == I32) reduce_by<int32_t>(reduction, out, sources, n, count);
    if (type == I64) reduce_by<int64_t>(reduction, out, sources, n, count);
}

struct Operation {
    Kind kind;
    int type, reduction;
    char* out;
    const char* in;
    int64_t count;  // elements of one rank's part; of all for an all-reduce
    std::vector<int64_t> sent, received;  // bytes to and from every rank, of an all-to-all
};

class Channel {
  public:
    Channel(int rank, int size, char* const* regions, const int* files, int64_t slot, double patience, int spins)
        : rank_(rank), size_(size), regions_(regions, regions + size), files_(files, files + size), slot_(slot),
          patience_(patience), spins_(spins), sources_(size) {}

    ~Channel() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        changed_.notify_all();
        if (thread_.joinable()) thread_.join();
    }

    int64_t post(Operation operation) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
        queue_.push_back(std::move(operation));
        changed_.notify_one();
        return ++posted_;
    }

    // Run what comes first, or sleep while another thread does, until operation `ticket` has ended.
    int wait(int64_t ticket, double* ended) {
        std::unique_lock<std::mutex> lock(mutex_);
        while (done_ < ticket) {
            if (queue_.empty() || running_) changed_.wait(lock);
            else run_first(lock, spins_);
        }
        *ended = ended_;
        return failure_;
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (!closing_) {
            if (queue_.empty() || running_) changed_.wait(lock);
            else run_first(lock, 0);  // beside the rank's own work: looking costs that
        }
    }

    void run_first(std::unique_lock<std::mutex>& lock, int spins) {
        const Operation operation = std::move(queue_.front());
        queue_.pop_front();
        running_ = true;
        spinning_ = spins;
        const bool works = failure_ == 0;
        lock.unlock();
        if (works) run(operation);
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        lock.lock();
        ended_ = static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
        running_ = false;
        ++done_;
        changed_.notify_all();
    }

    bool run(const Operation& operation) {
        switch (operation.kind) {
            case ALL_REDUCE: return all_reduce(operation);
            case ALL_GATHER: return all_gather(operation);
            case REDUCE_SCATTER: return reduce_scatter(operation);
            default: return all_to_all(operation);
        }
    }

    Counter& posted(int rank) { return *reinterpret_cast<Counter*>(regions_[rank]); }
    char* slot(int rank) { return regions_[rank] + HEAD + (round_ % 2) * slot_; }

    bool reached(Counter& counter, uint32_t target, int peer) {
        for (int spin = 0; spin < spinning_; ++spin) {
            if (counter.reached(target)) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        const auto deadline = Clock::now() + std::chrono::duration<double>(patience_);
        counter.sleepers.fetch_add(1);
        while (!counter.reached(target)) {
            const uint32_t seen = counter.value.load();
            if (static_cast<int32_t>(seen - target) >= 0) break;
            const timespec look{0, std::chrono::nanoseconds(LOOK).count()};
            const long code = syscall(SYS_futex, &counter.value, FUTEX_WAIT, seen, &look, nullptr, 0);
            if (code == 0 || errno != ETIMEDOUT || counter.reached(target)) continue;
            if (!alive(peer) && !counter.reached(target)) return fail(-peer - 1, counter);
            if (closing_ || Clock::now() > deadline) return fail(peer + 1, counter);
        }
        counter.sleepers.fetch_sub(1);
        return true;
    }

    bool fail(int failure, Counter& counter) {
        counter.sleepers.fetch_sub(1);
        failure_ = failure;
        return false;
    }

    // A rank holds a lock on its region's file for as long as its process lives.
    bool alive(int peer) const {
        struct flock query {};
        query.l_type = F_WRLCK;
        query.l_whence = SEEK_SET;
        query.l_len = 1;
        return fcntl(files_[peer], F_GETLK, &query) != 0 || query.l_type != F_UNLCK;
    }

    // One round: `write` fills this rank's slot, `read` takes from the others'. False when a peer has gone.
    template <class Write, class Read>
    bool exchange(Write write, Read read) {
        write(slot(rank_));
        posted(rank_).raise(round_ + 1);
        for (int step = 1; step < size_; ++step) {
            const int peer = (rank_ + step) % size_;
            if (!reached(posted(peer), round_ + 1, peer)) return false;
        }
        read();
        ++round_;
        return true;
    }

    bool gather(char* out, const char* in, int64_t stride, int64_t bytes) {
        return exchange([&](char* mine) { std::memcpy(mine, in, bytes); },
                        [&] {
                            for (int step = 1; step < size_; ++step) {
                                const int peer = (rank_ + step) % size_;
                                std::memcpy(out + peer * stride, slot(peer), bytes);
                            }
                        });
    }

    bool all_gather(const Operation& o) {
        const int64_t bytes = o.count * SIZES[o.type];
        if (o.out + rank_ * bytes != o.in) std::memcpy(o.out + rank_ * bytes, o.in, bytes);
        for (int64_t first = 0; first < bytes; first += slot_) {
            const int64_t length = bytes - first < slot_ ? bytes - first : slot_;
            if (!gather(o.out + first, o.in + first, bytes, length)) return false;
        }
        return true;
    }

    // Sum the ranks' parts of `in`, each `length` elements and `stride` apart, this rank's into `out`.
    bool scatter(const Operation& o, char* out, const char* in, int64_t stride, int64_t length) {
        const int64_t bytes = length * SIZES[o.type], room = slot_ / size_ / LINE * LINE;
        return exchange(
            [&](char* mine) {
                for (int peer = 0; peer < size_; ++peer)
                    if (peer != rank_) std::memcpy(mine + peer * room, in + peer * stride, bytes);
            },
            [&] {
                for (int peer = 0; peer < size_; ++peer)
                    sources_[peer] = peer == rank_ ? in + rank_ * stride : slot(peer) + rank_ * room;
                reduce(o.type, o.reduction, out, sources_.data(), size_, length);
            });
    }

    bool reduce_scatter(const Operation& o) {
        const int64_t size = SIZES[o.type], most = slot_ / size_ / LINE * LINE / size;
        for (int64_t first = 0; first < o.count; first += most) {
            const int64_t length = o.count - first < most ? o.count - first : most;
            if (!scatter(o, o.out + first * size, o.in + first * size, o.count * size, length)) return false;
        }
        return true;
    }

    bool all_reduce(const Operation& o) {
        const int64_t size = SIZES[o.type], bytes = o.count * size;
        if (size_ == 2 || bytes <= SMALL) {
            for (int64_t first = 0; first < bytes; first += slot_) {
                const int64_t length = bytes - first < slot_ ? bytes - first : slot_;
                if (!everything(o, o.out + first, length)) return false;
            }
            return true;
        }
        const int64_t most = slot_ / size_ / LINE * LINE / size;
        for (int64_t first = 0; first < o.count; first += most * size_) {  // the last part may be of other length
            char* begin = o.out + first * size;
            const int64_t left = o.count - first, part = left / size_ < most ? left / size_ : most;
            char* mine = begin + rank_ * part * size;
            if (part && !(scatter(o, mine, begin, part * size, part) && gather(begin, mine, part * size, part * size)))
                return false;
            const int64_t rest = left < most * size_ ? left - part * size_ : 0;
            if (rest && !everything(o, begin + part * size_ * size, rest * size)) return false;
        }
        return true;
    }

    // The first round tells every rank what all send, and so how many rounds there are.
    bool all_to_all(const Operation& o) {
        const int64_t room = slot_ / size_ / LINE * LINE, width = size_ * static_cast<int64_t>(sizeof(int64_t));
        std::vector<int64_t> sent(size_ * size_);
        std::memcpy(&sent[rank_ * size_], o.sent.data(), width);
        if (!gather(reinterpret_cast<char*>(sent.data()), reinterpret_cast<const char*>(o.sent.data()), width, width))
            return false;
        int64_t longest = 0;
        std::vector<int64_t> from(size_), to(size_);  // where each rank's part begins
        for (int rank = 0; rank < size_; ++rank) {
            if (sent[rank * size_ + rank_] != o.received[rank]) {
                failure_ = size_ + rank + 1;
                return false;
            }
            if (rank) {
                from[rank] = from[rank - 1] + o.received[rank - 1];
                to[rank] = to[rank - 1] + o.sent[rank - 1];
            }
            for (int peer = 0; peer < size_; ++peer)
                if (peer != rank && sent[rank * size_ + peer] > longest) longest = sent[rank * size_ + peer];
        }
        if (o.sent[rank_]) std::memcpy(o.out + from[rank_], o.in + to[rank_], o.sent[rank_]);
        const auto piece = [&](int64_t bytes, int64_t first) {
            return bytes < first ? 0 : bytes - first < room ? bytes - first : room;
        };
        for (int64_t first = 0; first < longest; first += room) {
            const bool done = exchange(
                [&](char* mine) {
                    for (int peer = 0; peer < size_; ++peer)
                        if (peer != rank_)
                            std::memcpy(mine + peer * room, o.in + to[peer] + first, piece(o.sent[peer], first));
                },
                [&] {
                    for (int peer = 0; peer < size_; ++peer)
                        if (peer != rank_)
                            std::memcpy(
                                o.out + from[peer] + first, slot(peer) + rank_ * room, piece(o.received[peer], first));
                });
            if (!done) return false;
        }
        return true;
    }

    // Reduce what fits one slot, every rank for itself.
    bool everything(const Operation& o, char* out, int64_t bytes) {
        return exchange([&](char* mine) { std::memcpy(mine, out, bytes); },
                        [&] {
                            for (int peer = 0; peer < size_; ++peer) sources_[peer] = peer == rank_ ? out : slot(peer);
                            reduce(o.type, o.reduction, out, sources_.data(), size_, bytes / SIZES[o.type]);
                        });
    }

    const int rank_, size_;
    const std::vector<char*> regions_;
    const std::vector<int> files_;
    const int64_t slot_;
    const double patience_;
    const int spins_;
    std::vector<const char*> sources_;
    uint32_t round_ = 0;
    int spinning_ = 0;

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Operation> queue_;
    std::thread thread_;
    std::atomic<bool> closing_{false};
    std::atomic<int> failure_{0};
    bool running_ = false;
    int64_t posted_ = 0, done_ = 0;
    double ended_ = 0;
};

}  // namespace

// Bytes of a region whose slots have `slot` bytes each.
EXPORT int64_t megapre_shared_bytes(int64_t slot) { return HEAD + 2 * slot; }

// A channel of rank `rank` of `size`. `regions`: where every rank's region is mapped, zeros at first; `files`: a
// descriptor of each other rank's file; `patience`: seconds until a silent peer fails an operation; `spins`: how often a
// counter is looked at before the thread sleeps.
EXPORT void* megapre_shared_open(
    int rank, int size, char* const* regions, const int* files, int64_t slot, double patience, int spins) {
    return new Channel(rank, size, regions, files, slot, patience, spins);
}

// Post an operation over `count` elements of type `type` a rank (in all, for an all-reduce); returns its ticket.
EXPORT int64_t megapre_shared_post(
    void* channel, int kind, int type, int reduction, char* out, const char* in, int64_t count) {
    return static_cast<Channel*>(channel)->post({static_cast<Kind>(kind), type, reduction, out, in, count, {}, {}});
}

// Post an all-to-all: `sent` and `received` are the bytes to and from each of `size` ranks, in their order.
EXPORT int64_t megapre_shared_post_all_to_all(
    void* channel, char* out, const char* in, const int64_t* sent, const int64_t* received, int size) {
    return static_cast<Channel*>(channel)->post(
        {ALL_TO_ALL, BYTES, SUM, out, in, 0, {sent, sent + size}, {received, received + size}});
}

// Wait for an operation. 0; p + 1 when rank p was silent for too long, -(p + 1) when it ended, ranks + p + 1 when it sends
// another number of bytes than this rank expects. `ended`: seconds of
// CLOCK_MONOTONIC at which the last operation to end had ended.
EXPORT int megapre_shared_wait(void* channel, int64_t ticket, double* ended) {
    return static_cast<Channel*>(channel)->wait(ticket, ended);
}

EXPORT void megapre_shared_close(void* channel) { delete static_cast<Channel*>(channel); }
