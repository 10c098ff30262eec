// The orthogonal transform of casp_quip_sharp/hadamard.py, of one vector at a time, so that it stays in the cache.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu_kernels.h"

namespace quiptools {

// A Kronecker product: dense factors, each of them next to the one before, and Sylvester's matrix, which runs fastest.
struct Transform {
  struct Factor {
    const float* matrix;
    int64_t order;
  };
  const Kernels* kernels;
  std::vector<Factor> factors; // in the order in which they are applied
  int64_t power, width;

  // Transforms the vector at `x` (width) with `other` (width) as work space, all but for Sylvester's 1 / sqrt(power),
  // which callers have in factors of their own; returns which of the two holds the result.
  float* apply(float* x, float* other) const;
};

// Checks the factors, which must outlive what is returned.
Transform read_transform(at::TensorList factors, int64_t power, const Kernels& kernels);

// Calls f(n, work) for n in [0, count), shared among threads; `work` is a vector that each thread keeps. A single call is
// made outside of any parallel region, so that it may share its own work.
template <class F>
void for_vectors(int64_t count, const F& f) {
  if (count == 1) {
    std::vector<float> work;
    return f(0, work);
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> work;
    for (int64_t n = begin; n < end; n++) f(n, work);
  });
}

} // namespace quiptools
