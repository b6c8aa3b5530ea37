// Which thread is the first to write each page of a packed weight, and the first to read it in a product: every page is made
// inaccessible before, so that its first access is a fault. A line per type of weight: its pages, and on how many both are one thread.
//
// Argument: the number of threads.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "library_calls.h"

static const int64_t PAGE = sysconf(_SC_PAGESIZE);
static uint8_t* data;
static int64_t pages;
static std::unique_ptr<std::atomic<long>[]> first;  // the thread of each page's first access

static void fault(int, siginfo_t* info, void*) {
    const int64_t page = (static_cast<uint8_t*>(info->si_addr) - data) / PAGE;
    if (info->si_addr < data || page >= pages) _exit(2);
    long nobody = 0;
    first[page].compare_exchange_strong(nobody, syscall(SYS_gettid));
    mprotect(data + page * PAGE, PAGE, PROT_READ | PROT_WRITE);
}

static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s: %s\n", what, rac_last_error());
    std::exit(1);
}

// Run `use` and return the first thread of each page.
template <class Use>
static std::vector<long> first_threads(const Use& use) {
    first.reset(new std::atomic<long>[pages]());
    mprotect(data, pages * PAGE, PROT_NONE);
    use();
    return std::vector<long>(first.get(), first.get() + pages);
}

int main(int, char** arguments) {
    const int32_t threads = std::atoi(arguments[1]);
    struct sigaction action = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    const int64_t rows = 3000, columns = 2048, panels = (rows + 15) / 16;
    std::mt19937 random(0);
    for (int32_t type : {0, 2, 3, 4, 5}) {  // of csrc/format/layout.h
        const bool masked = type != 3 && type != 5;
        std::vector<uint8_t> bitmask(masked ? rows * columns / 8 : 0);
        int64_t count = masked ? 0 : rows * columns;
        for (uint8_t& byte : bitmask) count += __builtin_popcount(byte = static_cast<uint8_t>(random()));
        const std::vector<uint8_t> values(count * (type == 0 ? 2 : 1), 1), x(4 * columns), bias;
        const std::vector<float> scale(panels * 16, 1);
        std::vector<uint8_t> out(4 * rows);
        const uint8_t* masks = masked ? bitmask.data() : nullptr;
        const int64_t mask_bytes = static_cast<int64_t>(bitmask.size()), scale_bytes = 4 * panels * 16;
        const int64_t bytes = rac_packed_bytes(rows, columns, count, type, masks, mask_bytes, 0);
        pages = (bytes + PAGE - 1) / PAGE;
        data = static_cast<uint8_t*>(mmap(nullptr, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        const auto writers = first_threads([&] {
            require(rac_pack_weight(values.data(), values.size(), masks, mask_bytes, nullptr, 0, 0, rows, columns, type, data, bytes,
                                    threads) == 0, "pack");
        });
        const auto readers = first_threads([&] {
            require(rac_sparse_linear(data, bytes, rows, columns, x.data(), x.size(), 1, 1, type ? scale.data() : nullptr,
                                      type ? scale_bytes : 0, 1, 1, nullptr, 0, 1, out.data(), out.size(), running_kernels().back().number,
                                      threads) == 0, "multiply");
        });
        int64_t written = 0, same = 0;
        for (int64_t page = 0; page < pages; page++) {
            written += writers[page] && readers[page];
            same += writers[page] && writers[page] == readers[page];
        }
        std::printf("%d %lld %lld\n", type, static_cast<long long>(written), static_cast<long long>(same));
        munmap(data, pages * PAGE);
    }
}
