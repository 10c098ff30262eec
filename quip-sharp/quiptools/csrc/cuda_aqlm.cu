// AQLM on CUDA: decoding, and the product of up to 16 vectors straight from the codes.
//
// A warp makes one row; its lanes walk along the row's groups, so that neighbouring lanes read neighbouring codes. Codebooks
// that fit, all but those of 12 bits and more, are copied into shared memory; others are read where they are, for
// the caches to hold.

#include <cuda_runtime.h>

#include "cuda_aqlm.h"

namespace quiptools {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;                 // to a block: as many rows
constexpr int64_t kMostShared = 48 << 10; // bytes that every device gives a block

int64_t shared_bytes(const CudaAQLM& m) {
  int64_t bytes = (static_cast<int64_t>(m.count) << m.bits) * m.group * sizeof(float);
  return bytes <= kMostShared ? bytes : 0;
}

// One thread to a group.
__global__ void decode_kernel(CudaAQLM m, float* out) {
  int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < m.rows * m.groups; at += step) {
    int64_t row = at / m.groups, g = at % m.groups, left = m.columns - g * m.group;
    float* place = out + row * m.columns + g * m.group;
    int width = static_cast<int>(left < m.group ? left : m.group);
    for (int k = 0; k < m.count; k++) {
      const float* word = word_at(m, m.codebooks, m.codes + row * m.bytes, g, k);
      for (int i = 0; i < width; i++) place[i] = k ? place[i] + word[i] : word[i];
    }
  }
}

// One warp to a row and `batch` vectors; known: the weights of a group, a multiple of 4, or 0 for any number.
template <int known, int batch>
__global__ void product_kernel(CudaAQLM m, bool shared, const float* x, float* y) {
  extern __shared__ float copied[];
  const float* words = m.codebooks;
  if (shared) {
    int entries = (m.count << m.bits) * m.group;
    for (int i = threadIdx.x; i < entries; i += blockDim.x) copied[i] = m.codebooks[i];
    __syncthreads();
    words = copied;
  }
  int lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, stride = m.groups * m.group;
  if (row >= m.rows) return; // a whole warp: those that stay are complete
  const uint8_t* codes = m.codes + row * m.bytes;
  float total[batch] = {};
  for (int64_t g = lane; g < m.groups; g += kWarp) {
    if constexpr (known > 0) {
      float4 weights[known / 4] = {};
      for (int k = 0; k < m.count; k++) {
        const float4* word = reinterpret_cast<const float4*>(word_at(m, words, codes, g, k));
#pragma unroll
        for (int i = 0; i < known / 4; i++) {
          float4 part = word[i];
          weights[i].x += part.x;
          weights[i].y += part.y;
          weights[i].z += part.z;
          weights[i].w += part.w;
        }
      }
#pragma unroll
      for (int b = 0; b < batch; b++) {
        const float4* xs = reinterpret_cast<const float4*>(x + b * stride + g * known);
#pragma unroll
        for (int i = 0; i < known / 4; i++) {
          float4 v = xs[i];
          total[b] += weights[i].x * v.x + weights[i].y * v.y + weights[i].z * v.z + weights[i].w * v.w;
        }
      }
    } else {
      for (int k = 0; k < m.count; k++) {
        const float* word = word_at(m, words, codes, g, k);
        for (int i = 0; i < m.group; i++) {
          float weight = word[i];
#pragma unroll
          for (int b = 0; b < batch; b++) total[b] += weight * x[b * stride + g * m.group + i];
        }
      }
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

template <int known, int batch>
void launch_batch(const CudaAQLM& m, const float* x, float* y, cudaStream_t stream) {
  int64_t blocks = (m.rows + kWarps - 1) / kWarps, bytes = shared_bytes(m);
  product_kernel<known, batch><<<blocks, kWarps * kWarp, bytes, stream>>>(m, bytes > 0, x, y);
}

// As few launches as parts of 8, 4, 2 and 1 vectors need.
template <int known>
cudaError_t launch_product(const CudaAQLM& m, const float* x, int64_t batch, float* y, cudaStream_t stream) {
  while (batch > 0) {
    int64_t part = batch >= 8 ? 8 : batch >= 4 ? 4 : batch >= 2 ? 2 : 1;
    if (part == 8) launch_batch<known, 8>(m, x, y, stream);
    if (part == 4) launch_batch<known, 4>(m, x, y, stream);
    if (part == 2) launch_batch<known, 2>(m, x, y, stream);
    if (part == 1) launch_batch<known, 1>(m, x, y, stream);
    batch -= part;
    x += part * m.groups * m.group;
    y += part * m.rows;
  }
  return cudaGetLastError();
}

} // namespace

cudaError_t cuda_aqlm_decode(const CudaAQLM& m, float* out, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMostBlocks = 65535;
  int64_t blocks = (m.rows * m.groups + kThreads - 1) / kThreads;
  decode_kernel<<<blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, stream>>>(m, out);
  return cudaGetLastError();
}

cudaError_t cuda_aqlm_product(const CudaAQLM& m, const float* x, int64_t batch, float* y, cudaStream_t stream) {
  if (m.group == 8) return launch_product<8>(m, x, batch, y, stream);
  if (m.group == 4) return launch_product<4>(m, x, batch, y, stream);
  return launch_product<0>(m, x, batch, y, stream);
}

} // namespace quiptools
