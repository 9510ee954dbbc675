// Ranks as threads of one process over csrc/host/shared.cpp, for ThreadSanitizer: shared_threads RANKS SEED OPERATIONS.
// Every result is compared with sums in the order of the ranks. Exit code 1 and a line when one is wrong.

#include "../../csrc/host/shared.cpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

constexpr int64_t SLOT_BYTES = 256;
static_assert(2 * SLOT_BYTES <= HEAD, "a region is two pages");

float value(int operation, int rank, int64_t i) { return static_cast<float>((operation * 7 + rank * 31 + i * 3) % 101); }

// Floats of an all-to-all from one rank to another.
int64_t part(int operation, int from, int to) { return (operation * 5 + from * 37 + to * 11) % 90; }

struct Plan {
    int kind, operation;
    int64_t count;
};

struct Posted {
    Plan plan;
    std::vector<float> in, out;
    int64_t ticket;
};

bool right(const Posted& posted, int rank, int size) {
    const Plan& plan = posted.plan;
    const int64_t n = plan.count;
    if (plan.kind == ALL_TO_ALL) {
        int64_t at = 0;
        for (int from = 0; from < size; ++from)
            for (int64_t i = 0; i < part(plan.operation, from, rank); ++i)
                if (posted.out[at++] != value(plan.operation, from, rank * 1000 + i)) return false;
        return true;
    }
    if (plan.kind == ALL_GATHER) {
        for (int64_t i = 0; i < n * size; ++i)
            if (posted.out[i] != value(plan.operation, static_cast<int>(i / n), i % n)) return false;
        return true;
    }
    const bool all = plan.kind == ALL_REDUCE;
    for (int64_t i = 0; i < (all ? n * size : n); ++i) {
        const int64_t at = all ? i : rank * n + i;
        float sum = value(plan.operation, 0, at);
        for (int peer = 1; peer < size; ++peer) sum += value(plan.operation, peer, at);
        if ((all ? posted.in : posted.out)[i] != sum) return false;
    }
    return true;
}

void post_all_to_all(void* channel, int rank, int size, Posted& posted) {
    std::vector<int64_t> sent, received;
    for (int peer = 0; peer < size; ++peer) {
        const int64_t to = part(posted.plan.operation, rank, peer), from = part(posted.plan.operation, peer, rank);
        sent.push_back(4 * to);
        received.push_back(4 * from);
        for (int64_t i = 0; i < to; ++i) posted.in.push_back(value(posted.plan.operation, rank, peer * 1000 + i));
        posted.out.resize(posted.out.size() + from, -1.0f);
    }
    posted.ticket = megapre_shared_post_all_to_all(
        channel, reinterpret_cast<char*>(posted.out.data()), reinterpret_cast<const char*>(posted.in.data()),
        sent.data(), received.data(), size);
}

// Operations are posted one to three at a time; a rank may dawdle before it waits for them, in any order.
bool run_rank(void* channel, int rank, int size, const std::vector<Plan>& plans) {
    std::mt19937 random(static_cast<unsigned>(rank));
    for (size_t first = 0; first < plans.size();) {
        std::vector<Posted> group(std::min<size_t>(1 + random() % 3, plans.size() - first));
        for (Posted& posted : group) {
            const Plan& plan = posted.plan = plans[first++];
            const int64_t n = plan.count, of_all = n * size;
            const bool all = plan.kind == ALL_REDUCE;
            if (plan.kind == ALL_TO_ALL) {
                post_all_to_all(channel, rank, size, posted);
                continue;
            }
            posted.out.assign(of_all, -1.0f);
            for (int64_t i = 0; i < of_all; ++i) posted.in.push_back(value(plan.operation, rank, i));
            char* in = reinterpret_cast<char*>(posted.in.data());
            char* out = all ? in : reinterpret_cast<char*>(posted.out.data());
            posted.ticket = megapre_shared_post(channel, plan.kind, F32, SUM, out, in, all ? of_all : n);
        }
        if (random() % 2) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
        std::shuffle(group.begin(), group.end(), random);
        for (const Posted& posted : group) {
            double ended;
            if (megapre_shared_wait(channel, posted.ticket, &ended) || !right(posted, rank, size)) return false;
        }
    }
    return true;
}

}  // namespace

int main(int, char** arguments) {
    const int size = std::atoi(arguments[1]);
    std::mt19937 random(static_cast<unsigned>(std::atoi(arguments[2])));
    std::vector<Plan> plans;
    for (int i = 0; i < std::atoi(arguments[3]); ++i)
        plans.push_back({static_cast<int>(random() % 4), i, static_cast<int64_t>(1 + random() % 400)});
    std::vector<char*> regions;
    for (int rank = 0; rank < size; ++rank) {
        regions.push_back(static_cast<char*>(std::aligned_alloc(HEAD, 2 * HEAD)));
        std::memset(regions.back(), 0, 2 * HEAD);
    }
    const std::vector<int> files(size, -1);  // fcntl fails on them, and so all ranks are alive
    std::vector<std::thread> threads;
    std::atomic<bool> right{true};
    for (int rank = 0; rank < size; ++rank)
        threads.emplace_back([&, rank] {
            void* channel = megapre_shared_open(rank, size, regions.data(), files.data(), SLOT_BYTES, 60.0, rank * 100);
            if (!run_rank(channel, rank, size, plans)) right = false;
            megapre_shared_close(channel);
        });
    for (std::thread& thread : threads) thread.join();
    for (char* region : regions) std::free(region);
    if (!right) std::puts("a result is wrong");
    return right ? 0 : 1;
}
