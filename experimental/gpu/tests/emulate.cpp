// The C interface of the emulator, compiled together with the kernels (-include of their source).
#include <dlfcn.h>

namespace emulator {

using Kernel = void (*)(const u8*, const u8*, const u8*, u8*, int, int, int, int, int);
struct Launch { Kernel kernel; const u8 *weight, *x, *bias; u8* out; int rows, columns, tokens, units, first_tile; };
inline Launch launch;

inline void enter() {
    launch.kernel(launch.weight, launch.x, launch.bias, launch.out, launch.rows, launch.columns, launch.tokens, launch.units,
                  launch.first_tile);
    fibres[self].done = true;
    progress++;
    while (true) yield();
}

inline void run_block(int threads, int shared_bytes) {
    fibres = std::vector<Fibre>(threads);
    operands = std::vector<Operands>(threads);
    shared.assign(shared_bytes, 0xff);
    granules.assign(shared_bytes / 4, {});
    reads.assign(size_t(shared_bytes / 4) * threads, 0);
    clock.assign(threads, std::vector<u32>(threads, 0));
    warps.assign(threads / 32, {});
    block = {};
    for (int i = 0; i < threads; i++) {
        clock[i][i] = 1;
        block.lanes.push_back(i);
        warps[i / 32].lanes.push_back(i);
        Fibre& fibre = fibres[i];
        fibre.stack.resize(1 << 16);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    for (bool all_done = false; !all_done && error.empty();) {
        const uint64_t before = progress;
        all_done = true;
        for (self = 0; self < threads && error.empty(); self++) {
            if (fibres[self].done) continue;
            resume(fibres[self]);
            all_done = all_done && fibres[self].done;
        }
        if (!all_done && progress == before && error.empty()) error = "deadlock: some threads never come to " + block.what;
    }
    for (const Fibre& fibre : fibres)
        for (const auto& group : fibre.groups)
            if (error.empty() && !group.empty()) error = "a copy is still in flight at the end";
}

}  // namespace emulator

// Runs a kernel. Pointers with their sizes; `bias` may be null. `skip` is a barrier to leave out, "file:line", or "".
// Returns the first error, or "".
extern "C" const char* emulate(const char* name, int grid_x, int grid_y, int shared_bytes, const u8* weight, int64_t weight_bytes,
                               const u8* x, int64_t x_bytes, const u8* bias, int64_t bias_bytes, u8* out, int64_t out_bytes,
                               int rows, int columns, int tokens, int units, int first_tile, const char* skip) {
    using namespace emulator;
    error.clear();
    sites.clear();
    skipped = skip;
    ranges = {{weight, weight_bytes, false, {}}, {x, x_bytes, false, {}}, {bias, bias_bytes, false, {}},
              {out, out_bytes, true, std::vector<bool>(out_bytes)}};
    Dl_info here;
    dladdr(reinterpret_cast<void*>(&emulate), &here);
    void* library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void* kernel = dlsym(library, name);
    const int* threads = static_cast<const int*>(dlsym(library, (std::string(name) + "_threads").c_str()));
    if (!kernel || !threads) return "no such kernel";
    launch = {reinterpret_cast<Kernel>(kernel), weight, x, bias, out, rows, columns, tokens, units, first_tile};
    for (block_number[1] = 0; block_number[1] < grid_y && error.empty(); block_number[1]++)
        for (block_number[0] = 0; block_number[0] < grid_x && error.empty(); block_number[0]++) run_block(*threads, shared_bytes);
    return error.c_str();
}

// The barriers and waits that the last run came to, separated by spaces.
extern "C" const char* emulated_sites() {
    static std::string text;
    text.clear();
    for (const std::string& site : emulator::sites) text += site + " ";
    return text.c_str();
}
