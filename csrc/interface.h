// The C interface; library.cpp and torch_operator.cpp say what each function does.
#pragma once
#include <cstdint>

#define RAC_EXPORT extern "C" __attribute__((visibility("default")))

RAC_EXPORT int32_t rac_abi();
RAC_EXPORT const char* rac_kernels();
RAC_EXPORT const char* rac_compiler();
RAC_EXPORT const char* rac_last_error();
RAC_EXPORT int64_t rac_packed_bytes(int64_t rows, int64_t columns, int64_t nonzeros, int32_t type, const uint8_t* bitmask,
                                    int64_t bitmask_bytes, int64_t zero_groups);
RAC_EXPORT int32_t rac_pack_weight(const void* values, int64_t value_bytes, const uint8_t* bitmask, int64_t bitmask_bytes,
                                   const uint8_t* zeros, int64_t zero_bytes, int64_t zero_groups, int64_t rows,
                                   int64_t columns, int32_t type, void* data, int64_t bytes, int32_t threads);
RAC_EXPORT int32_t rac_check_weight(const void* data, int64_t bytes, int64_t rows, int64_t columns, int32_t type);
RAC_EXPORT int32_t rac_value_type(const void* data, int64_t bytes);
RAC_EXPORT int32_t rac_set_activation_bits(void* data, int64_t bytes, int32_t bits);
RAC_EXPORT int32_t rac_expand_panels(const void* data, int64_t bytes, int64_t rows, int64_t columns, int64_t first,
                                     int64_t last, float* out, int64_t out_bytes, int32_t number, int32_t threads);
RAC_EXPORT int32_t rac_sparse_linear(const void* data, int64_t bytes, int64_t rows, int64_t columns, const void* x,
                                     int64_t x_bytes, int32_t x_type, int64_t m, const void* scale,
                                     int64_t scale_bytes, int32_t scale_type, int64_t groups, const void* bias,
                                     int64_t bias_bytes, int32_t bias_type, void* out, int64_t out_bytes, int32_t number,
                                     int32_t threads);
RAC_EXPORT int32_t rac_add_panels(const void* data, int64_t bytes, int64_t rows, int64_t columns, const float* x, int64_t x_bytes,
                                  int64_t m, const int64_t* panels, int64_t panel_bytes, int64_t count, const float* scale,
                                  int64_t scale_bytes, float* out, int64_t out_bytes, int32_t number, int32_t threads);
RAC_EXPORT int32_t rac_register_operator(const void* const* functions, int32_t count);
RAC_EXPORT int32_t rac_use_operator(int32_t number, int64_t tokens);
