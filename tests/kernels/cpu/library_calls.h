// The functions of the compiled library (csrc/library.cpp), for the programs of these tests.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
int32_t rac_abi();
const char* rac_kernels();
const char* rac_compiler();
const char* rac_last_error();
int64_t rac_packed_bytes(int64_t, int64_t, int64_t, int32_t, const uint8_t*, int64_t, int64_t);
int32_t rac_pack_weight(const void*, int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t,
                        int32_t, void*, int64_t, int32_t);
int32_t rac_check_weight(const void*, int64_t, int64_t, int64_t, int32_t);
int32_t rac_value_type(const void*, int64_t);
int32_t rac_set_activation_bits(void*, int64_t, int32_t);
int32_t rac_expand_panels(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t, int32_t, int32_t);
int32_t rac_sparse_linear(const void*, int64_t, int64_t, int64_t, const void*, int64_t, int32_t, int64_t, const void*,
                          int64_t, int32_t, int64_t, const void*, int64_t, int32_t, void*, int64_t, int32_t, int32_t);
}

struct KernelLine {
    int32_t number;
    std::string name;
    bool bytes;  // it multiplies bytes of x
};

// The kernels that this processor runs, the best one last.
static inline std::vector<KernelLine> running_kernels() {
    std::vector<KernelLine> running;
    for (const char* line = rac_kernels(); *line; line = std::strchr(line, '\n') + 1) {
        int number, runs, bytes;
        char name[32];
        if (std::sscanf(line, "%d %31s %*s %d %d", &number, name, &runs, &bytes) == 4 && runs)
            running.push_back({number, name, bytes == 1});
    }
    return running;
}
