// AQLM's CUDA kernels, on plain device pointers; asynchronous on the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_aqlm_decode.h"

namespace quiptools {

// out (rows, columns), without the scales of the rows.
cudaError_t cuda_aqlm_decode(const CudaAQLM& m, float* out, cudaStream_t stream);

// y[b * rows + r] = sum_k W[r][k] x[b * stride + k], without the scales, for 1 <= batch <= 16 vectors; stride: groups *
// group numbers, zeros behind the matrix's columns.
cudaError_t cuda_aqlm_product(const CudaAQLM& m, const float* x, int64_t batch, float* y, cudaStream_t stream);

} // namespace quiptools
