// Which thread packs, and which multiplies, which panels.
//
// A row of the result belongs to one share, so no sum depends on the shares. Where all cores are alike, each thread has a share, the
// same in every call: it reads the panels that it packed, whose pages are in the memory of its NUMA node, since a page is placed where
// the thread runs that first writes it. Where cores differ, shares are smaller, and a thread takes the next share when it is done.
#pragma once
#include <algorithm>
#include <cstdint>

#include "processor.h"

namespace rac {

constexpr int64_t SHARES_PER_THREAD = 8;  // at most, where cores differ
constexpr int64_t SHARE_PAIRS = 8;        // at least, of a matmul with many tokens, which stay in the cache

// Call work(first, last) for shares [first, last) of the panels. Returns whether all calls returned true. Shares are of whole pairs of
// panels, since AMX multiplies two at a time; where cores differ of `least` pairs, if there are enough.
template <class Work>
bool in_shares(int64_t panels, int threads, int64_t least, const Work& work) {
    const int64_t pairs = (panels + 1) / 2;
    if (threads > pairs) threads = static_cast<int>(pairs);
    const bool by_turns = threads > 1 && cores_differ();
    const int64_t shares = by_turns ? std::clamp(pairs / least, int64_t{threads}, threads * SHARES_PER_THREAD) : threads;
    const auto run = [&](int64_t share) {
        return work(2 * (pairs * share / shares), std::min(2 * (pairs * (share + 1) / shares), panels));
    };
    bool done = true;
    if (by_turns) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : done)
        for (int64_t share = 0; share < shares; share++) done = run(share) && done;
    } else {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : done) if (threads > 1)
        for (int64_t share = 0; share < shares; share++) done = run(share) && done;
    }
    return done;
}

}  // namespace rac
