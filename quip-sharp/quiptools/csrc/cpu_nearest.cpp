// The nearest sums of two codewords, over many vectors.
#include "cpu_nearest.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "instruction_sets.h"

namespace quiptools {
namespace {

constexpr int64_t kGrain = 2 * kTargets; // vectors a thread takes at least

NearestPairs chosen(Isa isa) {
  if (isa >= Isa::avx512) return avx512_nearest();
  return isa == Isa::avx2 ? avx2_nearest() : portable_nearest();
}

void check(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu(), name, " are float32, on the CPU");
}

at::Tensor aqlm_nearest_pairs(const at::Tensor& targets, const at::Tensor& codebooks, std::string isa) {
  check(targets, "targets");
  check(codebooks, "codebooks");
  TORCH_CHECK_VALUE(codebooks.dim() == 3 && codebooks.size(0) == 2 && codebooks.size(1) > 0 &&
                        codebooks.size(1) % kWords == 0 && codebooks.size(2) > 0,
                    "two codebooks (2, entries, group) have a multiple of ", kWords, " entries");
  const int64_t size = codebooks.size(1), group = codebooks.size(2);
  TORCH_CHECK_VALUE(targets.dim() == 2 && targets.size(1) == group, "targets are vectors of ", group, " numbers");
  NearestPairs search = chosen(set_named(isa));
  at::Tensor vectors = targets.contiguous(), columns = codebooks.transpose(1, 2).contiguous();
  at::Tensor norms = codebooks.square().sum(-1);
  at::Tensor transposed = at::mm(codebooks.select(0, 1), codebooks.select(0, 0).t()).mul_(2);
  at::Tensor products = transposed.t().reshape({size, size / kWords, kWords}).transpose(0, 1).contiguous();
  const float *words = columns.const_data_ptr<float>(), *squares = norms.const_data_ptr<float>();
  Pairs pairs{size, group, {words, words + group * size}, {squares, squares + size}, products.const_data_ptr<float>(),
              transposed.const_data_ptr<float>()};
  at::Tensor places = at::empty({vectors.size(0), 2}, vectors.options().dtype(at::kLong));
  const float* from = vectors.const_data_ptr<float>();
  int64_t* to = places.mutable_data_ptr<int64_t>();
  at::parallel_for(0, vectors.size(0), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(nearest_scratch(size));
    search(pairs, from + begin * group, end - begin, scratch.data(), to + 2 * begin);
  });
  return places;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(quiptools, library) {
  library.def("aqlm_nearest_pairs(Tensor targets, Tensor codebooks, str isa='') -> Tensor");
}

TORCH_LIBRARY_IMPL(quiptools, CPU, library) { library.impl("aqlm_nearest_pairs", aqlm_nearest_pairs); }

} // namespace quiptools
