// The CUDA kernels: decoding, and the product of up to 16 vectors straight from the codes.
//
// A warp makes one row; its lanes walk along the row's groups, so that neighbouring lanes read neighbouring codes. Both
// tables are packed into 4 KB of shared memory, a byte to a coordinate.

#include <cuda_runtime.h>

#include "cuda_decode.h"
#include "cuda_kernels.h"

namespace quiptools {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8; // to a block: as many rows
constexpr int kTable = 256;

struct Tables {
  Point patterns[kTable], points[kTable];

  __device__ void fill(const CudaMatrix& m) {
    for (int i = threadIdx.x; i < kTable; i += blockDim.x) {
      patterns[i] = pack(m.patterns + 8 * i);
      points[i] = pack(m.points + 8 * i);
    }
    __syncthreads();
  }
};

template <int book>
__device__ void add_point(const Tables& tables, const void* codes, int64_t at, float scale, float* weights) {
  if constexpr (book == 16) {
    uint32_t code = static_cast<const uint16_t*>(codes)[at];
    add_e8p(code, tables.patterns[code & 0xFF], scale, weights);
  } else if constexpr (book == 8) {
    add_e8(tables.points[static_cast<const uint8_t*>(codes)[at]], scale, weights);
  }
}

template <int book, int residual_book>
__device__ void decode_group(const CudaMatrix& m, const Tables& tables, int64_t at, float* weights) {
#pragma unroll
  for (int i = 0; i < 8; i++) weights[i] = 0;
  add_point<book>(tables, m.codes, at, 1.0f, weights);
  add_point<residual_book>(tables, m.residual, at, m.residual_scale, weights);
}

// One thread to a group.
template <int book, int residual_book>
__global__ void decode_kernel(CudaMatrix m, float* out) {
  __shared__ Tables tables;
  tables.fill(m);
  int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < m.rows * m.groups; at += step) {
    float weights[8];
    decode_group<book, residual_book>(m, tables, at, weights);
    float4* place = reinterpret_cast<float4*>(out) + 2 * at;
    place[0] = make_float4(weights[0], weights[1], weights[2], weights[3]);
    place[1] = make_float4(weights[4], weights[5], weights[6], weights[7]);
  }
}

// One warp to a row and `batch` vectors.
template <int book, int residual_book, int batch>
__global__ void product_kernel(CudaMatrix m, const float* x, float* y) {
  __shared__ Tables tables;
  tables.fill(m);
  int lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= m.rows) return; // a whole warp: those that stay are complete
  float total[batch] = {};
  for (int64_t g = lane; g < m.groups; g += kWarp) {
    float weights[8];
    decode_group<book, residual_book>(m, tables, row * m.groups + g, weights);
#pragma unroll
    for (int b = 0; b < batch; b++) {
      const float4* xs = reinterpret_cast<const float4*>(x) + 2 * (b * m.groups + g);
      float4 low = xs[0], high = xs[1];
      total[b] += weights[0] * low.x + weights[1] * low.y + weights[2] * low.z + weights[3] * low.w +
                  weights[4] * high.x + weights[5] * high.y + weights[6] * high.z + weights[7] * high.w;
    }
  }
#pragma unroll
  for (int b = 0; b < batch; b++) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      total[b] += __shfl_xor_sync(0xFFFFFFFFu, total[b], distance);
    if (lane == 0) y[b * m.rows + row] = total[b];
  }
}

template <int book, int residual_book, int batch>
void launch_batch(const CudaMatrix& m, const float* x, float* y, cudaStream_t stream) {
  int64_t blocks = (m.rows + kWarps - 1) / kWarps;
  product_kernel<book, residual_book, batch><<<blocks, kWarps * kWarp, 0, stream>>>(m, x, y);
}

// As few launches as parts of 8, 4, 2 and 1 vectors need.
template <int book, int residual_book>
cudaError_t launch_product(const CudaMatrix& m, const float* x, int64_t batch, float* y, cudaStream_t stream) {
  while (batch > 0) {
    int64_t part = batch >= 8 ? 8 : batch >= 4 ? 4 : batch >= 2 ? 2 : 1;
    if (part == 8) launch_batch<book, residual_book, 8>(m, x, y, stream);
    if (part == 4) launch_batch<book, residual_book, 4>(m, x, y, stream);
    if (part == 2) launch_batch<book, residual_book, 2>(m, x, y, stream);
    if (part == 1) launch_batch<book, residual_book, 1>(m, x, y, stream);
    batch -= part;
    x += part * m.groups * 8;
    y += part * m.rows;
  }
  return cudaGetLastError();
}

template <int book, int residual_book>
cudaError_t launch_decode(const CudaMatrix& m, float* out, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMostBlocks = 65535;
  int64_t blocks = (m.rows * m.groups + kThreads - 1) / kThreads;
  decode_kernel<book, residual_book><<<blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, stream>>>(m, out);
  return cudaGetLastError();
}

} // namespace

cudaError_t cuda_decode(const CudaMatrix& m, float* out, cudaStream_t stream) {
  if (m.book == 8) return launch_decode<8, 0>(m, out, stream);
  if (m.residual_book == 0) return launch_decode<16, 0>(m, out, stream);
  if (m.residual_book == 8) return launch_decode<16, 8>(m, out, stream);
  return launch_decode<16, 16>(m, out, stream);
}

cudaError_t cuda_product(const CudaMatrix& m, const float* x, int64_t batch, float* y, cudaStream_t stream) {
  if (m.book == 8) return launch_product<8, 0>(m, x, batch, y, stream);
  if (m.residual_book == 0) return launch_product<16, 0>(m, x, batch, y, stream);
  if (m.residual_book == 8) return launch_product<16, 8>(m, x, batch, y, stream);
  return launch_product<16, 16>(m, x, batch, y, stream);
}

} // namespace quiptools
