// in_shares of csrc/gemm/shares.h on cores that are alike, or not (-DDIFFER=1): which panels each thread gets.
#include "gemm/shares.h"

#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

bool rac::cores_differ() { return DIFFER; }

static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// The number of the thread that had each panel.
static std::vector<int> owners(int64_t panels, int threads, int64_t least) {
    std::vector<int> found(panels, -1);
    std::mutex mutex;
    const bool done = rac::in_shares(panels, threads, least, [&](int64_t first, int64_t last) {
        const int thread = omp_get_thread_num();
        const std::lock_guard<std::mutex> lock(mutex);
        require(first % 2 == 0 && first < last && last <= panels && (last % 2 == 0 || last == panels), "whole pairs of panels");
        for (int64_t panel = first; panel < last; panel++) {
            require(found[panel] == -1, "a panel in two shares");
            found[panel] = thread;
        }
        return true;
    });
    require(done, "every share was done");
    for (int thread : found) require(thread >= 0, "a panel in no share");
    return found;
}

int main() {
    for (int64_t panels : {1, 2, 3, 9, 16, 47, 128})
        for (int threads : {1, 2, 3, 5})
            for (int64_t least : {1, 8}) {
                const std::vector<int> once = owners(panels, threads, least);
                if (!DIFFER) require(once == owners(panels, threads, 9 - least), "each thread has the same panels in every call");
                for (int64_t bad = 0; bad < panels; bad += 1 + panels / 2)
                    require(!rac::in_shares(panels, threads, least, [&](int64_t first, int64_t last) { return bad < first || bad >= last; }),
                            "a share that failed");
            }
}
