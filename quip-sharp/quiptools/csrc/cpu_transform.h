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
    std::vector<uint16_t> tiles; // see `SignTiles::pack`; empty where the matrix is used
    float size;                  // of the entries that the tiles have the signs of
  };
  const Kernels* kernels;
  std::vector<Factor> factors; // in the order in which they are applied
  int64_t power, width;

  // For many vectors, where the CPU multiplies tiles of bfloat16: factors whose entries have one size become tiles of
  // their signs. What they multiply is split into two bfloat16, of 16 bits in all.
  void use_tiles();

  // What `apply` leaves to be multiplied by, which callers have in factors of their own.
  float rest() const;

  // Numbers of each of the two places that `apply` takes: the width, and room behind it.
  int64_t room() const;

  // Transforms the vector at `x` with `other` as work space, `room()` numbers each; returns which of the two holds the
  // result.
  float* apply(float* x, float* other) const;
};

// Checks the factors, which must outlive what is returned.
Transform read_transform(at::TensorList factors, int64_t power, const Kernels& kernels);

// Calls f(n) for n in [0, count), shared among threads. A single call is made outside of any parallel region, so that it
// may share its own work.
template <class F>
void for_vectors(int64_t count, const F& f) {
  if (count == 1) return f(0);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) f(n);
  });
}

} // namespace quiptools
