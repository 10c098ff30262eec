// The trellis's CUDA kernels, on plain device pointers; asynchronous on the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda_trellis_decode.h"

namespace quiptools {

// out (rows, columns).
cudaError_t cuda_trellis_decode(const CudaTrellis& m, float* out, cudaStream_t stream);

// Parts into which the columns are cut, so that a matrix of few strips fills the device.
int64_t cuda_trellis_parts(const CudaTrellis& m);

// Sums of each part, sums[(p * batch + b) * rows + r], for batch = 1, 2, 4, 8 or 16 vectors; they begin `stride` numbers
// apart, a multiple of 4, with zeros behind the matrix's columns.
cudaError_t cuda_trellis_product(const CudaTrellis& m, const float* x, int64_t stride, int64_t batch, int64_t parts,
                                 float* sums, cudaStream_t stream);

} // namespace quiptools
