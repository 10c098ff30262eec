// The trellis on CUDA: decoding, and the product of up to 16 vectors straight from the codes.
//
// A block takes one strip and a part of its columns, a thread one row. The entries of all windows are in shared memory, at
// most 4 KB. Where streams lie byte by byte, two words hold what the windows of four columns are cut from, and the threads
// of a warp read neighbouring ones; all of them multiply by the same four activations, a broadcast.

#include <cuda_runtime.h>

#include "cuda_trellis.h"

namespace quiptools {
namespace {

constexpr int kBlocksWanted = 1024;

template <bool wide>
struct Entries {
  int8_t entry[wide ? 1 << kMostStates : 256];

  __device__ void fill(const CudaTrellis& m) {
    for (int window = threadIdx.x; window < 1 << m.states; window += blockDim.x)
      entry[window] = entry_of(m, static_cast<uint32_t>(window));
    __syncthreads();
  }
};

__device__ __forceinline__ uint32_t word_at(const CudaGroup& group, int b) {
  // Groups begin at any byte: a strip's bytes are no multiple of four where its columns are not.
  const uint8_t* place = group.bytes + kCudaWay * (b % (group.stream_bits / 8));
  return place[0] | static_cast<uint32_t>(place[1]) << 8 | static_cast<uint32_t>(place[2]) << 16 |
         static_cast<uint32_t>(place[3]) << 24;
}

template <bool wide>
__device__ __forceinline__ void weights_of(const CudaTrellis& m, const Entries<wide>& entries, const CudaGroup& group,
                                           int row, float weights[kCudaWay]) {
  uint32_t windows[kCudaWay];
  if (group.whole_bytes && group.way == kCudaWay) {
    int bit = row * m.rate, first = bit / 8, shift = bit % 8;
    uint32_t low = word_at(group, first), high = word_at(group, first + 1), top = wide ? word_at(group, first + 2) : 0;
#pragma unroll
    for (int j = 0; j < kCudaWay; j++) {
      uint32_t found = (low >> 8 * j & 0xFF) | (high >> 8 * j & 0xFF) << 8 | (top >> 8 * j & 0xFF) << 16;
      windows[j] = found >> shift & ((1u << m.states) - 1);
    }
  } else {
    windows_of(m, group, row, windows);
  }
#pragma unroll
  for (int j = 0; j < kCudaWay; j++) weights[j] = static_cast<float>(entries.entry[windows[j]]) * kCudaTableUnit;
}

template <bool wide>
__global__ void decode_kernel(CudaTrellis m, float* out) {
  __shared__ Entries<wide> entries;
  entries.fill(m);
  int row = threadIdx.x;
  int64_t at = static_cast<int64_t>(blockIdx.y) * kCudaStrip + row, groups = (m.columns + kCudaWay - 1) / kCudaWay;
  if (at >= m.rows) return;
  for (int64_t g = blockIdx.x; g < groups; g += gridDim.x) {
    CudaGroup group = group_of(m, blockIdx.y, g);
    float weights[kCudaWay];
    weights_of(m, entries, group, row, weights);
    for (int j = 0; j < group.way; j++) out[at * m.columns + g * kCudaWay + j] = weights[j];
  }
}

template <bool wide, int batch>
__global__ void product_kernel(CudaTrellis m, const float* x, int64_t stride, int64_t part, float* sums) {
  __shared__ Entries<wide> entries;
  entries.fill(m);
  int row = threadIdx.x;
  int64_t at = static_cast<int64_t>(blockIdx.y) * kCudaStrip + row, groups = (m.columns + kCudaWay - 1) / kCudaWay;
  if (at >= m.rows) return;
  int64_t begin = blockIdx.x * part, end = begin + part < groups ? begin + part : groups;
  float total[batch] = {};
  for (int64_t g = begin; g < end; g++) {
    float weights[kCudaWay];
    weights_of(m, entries, group_of(m, blockIdx.y, g), row, weights);
#pragma unroll
    for (int b = 0; b < batch; b++) {
      float4 xs = *reinterpret_cast<const float4*>(x + b * stride + g * kCudaWay);
      total[b] += weights[0] * xs.x + weights[1] * xs.y + weights[2] * xs.z + weights[3] * xs.w;
    }
  }
#pragma unroll
  for (int b = 0; b < batch; b++) sums[(static_cast<int64_t>(blockIdx.x) * batch + b) * m.rows + at] = total[b];
}

dim3 grid_of(const CudaTrellis& m, int64_t across) {
  return dim3(static_cast<unsigned>(across), static_cast<unsigned>((m.rows + kCudaStrip - 1) / kCudaStrip));
}

template <bool wide>
cudaError_t launch_product(const CudaTrellis& m, const float* x, int64_t stride, int64_t batch, int64_t parts, float* sums,
                           cudaStream_t stream) {
  int64_t groups = (m.columns + kCudaWay - 1) / kCudaWay, part = (groups + parts - 1) / parts;
  dim3 grid = grid_of(m, parts);
  if (batch == 1) product_kernel<wide, 1><<<grid, kCudaStrip, 0, stream>>>(m, x, stride, part, sums);
  if (batch == 2) product_kernel<wide, 2><<<grid, kCudaStrip, 0, stream>>>(m, x, stride, part, sums);
  if (batch == 4) product_kernel<wide, 4><<<grid, kCudaStrip, 0, stream>>>(m, x, stride, part, sums);
  if (batch == 8) product_kernel<wide, 8><<<grid, kCudaStrip, 0, stream>>>(m, x, stride, part, sums);
  if (batch == 16) product_kernel<wide, 16><<<grid, kCudaStrip, 0, stream>>>(m, x, stride, part, sums);
  return cudaGetLastError();
}

} // namespace

cudaError_t cuda_trellis_decode(const CudaTrellis& m, float* out, cudaStream_t stream) {
  int64_t groups = (m.columns + kCudaWay - 1) / kCudaWay;
  dim3 grid = grid_of(m, groups < kBlocksWanted ? groups : kBlocksWanted);
  if (m.states > 8) {
    decode_kernel<true><<<grid, kCudaStrip, 0, stream>>>(m, out);
  } else {
    decode_kernel<false><<<grid, kCudaStrip, 0, stream>>>(m, out);
  }
  return cudaGetLastError();
}

int64_t cuda_trellis_parts(const CudaTrellis& m) {
  constexpr int64_t kLeastGroups = 16; // that are worth filling the entries
  int64_t strips = (m.rows + kCudaStrip - 1) / kCudaStrip, groups = (m.columns + kCudaWay - 1) / kCudaWay;
  int64_t wanted = (kBlocksWanted + strips - 1) / strips, most = (groups + kLeastGroups - 1) / kLeastGroups;
  return wanted < most ? wanted : most;
}

cudaError_t cuda_trellis_product(const CudaTrellis& m, const float* x, int64_t stride, int64_t batch, int64_t parts,
                                 float* sums, cudaStream_t stream) {
  if (m.states > 8) return launch_product<true>(m, x, stride, batch, parts, sums, stream);
  return launch_product<false>(m, x, stride, batch, parts, sums, stream);
}

} // namespace quiptools
