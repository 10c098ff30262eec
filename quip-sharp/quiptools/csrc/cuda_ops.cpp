// The CUDA operators: checks, memory, streams. The arithmetic is in cuda_kernels.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <string>

#include "cuda_kernels.h"
#include "ops.h"

namespace quiptools {
namespace {

using at::Tensor;

CudaMatrix matrix_of(const Codes& codes) {
  auto book = [](const Tensor& t) { return t.scalar_type() == at::kByte ? 8 : 16; };
  CudaMatrix m;
  m.book = book(codes.first);
  m.residual_book = codes.second.defined() ? book(codes.second) : 0;
  m.codes = codes.first.const_data_ptr();
  m.residual = codes.second.defined() ? codes.second.const_data_ptr() : nullptr;
  m.residual_scale = static_cast<float>(codes.residual_scale);
  m.patterns = codes.patterns.const_data_ptr<float>();
  m.points = codes.points.const_data_ptr<float>();
  m.rows = codes.first.size(0);
  m.groups = codes.first.size(1);
  return m;
}

void check_isa(const std::string& isa) {
  TORCH_CHECK_VALUE(isa.empty(), "instruction sets are for CPUs; ", isa, " does not apply to CUDA tensors");
}

Tensor decode(const Tensor& codes, const std::optional<Tensor>& residual, const Tensor& patterns, const Tensor& points,
              double residual_scale, std::string isa) {
  check_isa(isa);
  CudaMatrix m = matrix_of(check_codes(codes, residual, patterns, points, residual_scale));
  c10::cuda::CUDAGuard guard(codes.device());
  Tensor out = at::empty({m.rows, m.groups * 8}, patterns.options());
  if (out.numel()) C10_CUDA_CHECK(cuda_decode(m, out.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

// More vectors than the kernel takes are multiplied by cuBLAS, their factors rounded to `dtype`.
Tensor product(const Tensor& x, const Tensor& codes, const std::optional<Tensor>& residual, const Tensor& patterns,
               const Tensor& points, double residual_scale, at::ScalarType dtype, std::string isa) {
  check_isa(isa);
  Codes checked = check_codes(codes, residual, patterns, points, residual_scale);
  check_vectors(x, checked);
  if (x.size(0) > kLargestCudaBatch) {
    // The product before the scale is some 30 times the output: float16 would overflow where outputs are large.
    constexpr double kHeadroom = 32;
    Tensor weight = decode(codes, residual, patterns, points, residual_scale, isa);
    return at::mm(x.to(at::kFloat).div(kHeadroom).to(dtype), weight.to(dtype).t()).to(at::kFloat).mul(kHeadroom);
  }
  CudaMatrix m = matrix_of(checked);
  c10::cuda::CUDAGuard guard(codes.device());
  Tensor vectors = x.to(at::kFloat).contiguous();
  Tensor y = at::empty({x.size(0), m.rows}, vectors.options());
  if (y.numel()) {
    C10_CUDA_CHECK(cuda_product(m, vectors.const_data_ptr<float>(), x.size(0), y.mutable_data_ptr<float>(),
                                c10::cuda::getCurrentCUDAStream()));
  }
  return y;
}

} // namespace

TORCH_LIBRARY_IMPL(quiptools, CUDA, library) {
  library.impl("decode", decode);
  library.impl("product", product);
}

} // namespace quiptools
