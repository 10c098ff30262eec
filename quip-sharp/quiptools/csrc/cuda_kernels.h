// What the CUDA kernels compute, on plain device pointers; both are asynchronous on the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace quiptools {

constexpr int64_t kLargestCudaBatch = 16;

// A quantized matrix: W = point(codes) + residual_scale * point(residual). book: 8 or 16, the bits of a code (the small
// codebook or E8P12); residual_book: 0, 8 or 16. Tables as in cpu_kernels.h, on the device.
struct CudaMatrix {
  int book, residual_book;
  const void *codes, *residual; // (rows, groups)
  float residual_scale;
  const float *patterns, *points; // (256, 8)
  int64_t rows, groups;
};

// out (rows, groups * 8): all points.
cudaError_t cuda_decode(const CudaMatrix& m, float* out, cudaStream_t stream);

// y[b * rows + r] = sum_k W[r][k] x[b][k] for 1 <= batch <= kLargestCudaBatch vectors.
cudaError_t cuda_product(const CudaMatrix& m, const float* x, int64_t batch, float* y, cudaStream_t stream);

} // namespace quiptools
