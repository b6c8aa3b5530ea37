// The functions of the compiled library (csrc/library.cpp), for the programs of these tests.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "interface.h"

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
