// The CUDA operators: checks, memory, streams. The arithmetic is in cuda_kernels.cu, cuda_trellis.cu and cuda_aqlm.cu.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda_aqlm.h"
#include "cuda_kernels.h"
#include "cuda_trellis.h"
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

// More vectors than the kernels take are multiplied by cuBLAS, their factors rounded to `dtype`.
Tensor multiply_dense(const Tensor& x, const Tensor& weight, at::ScalarType dtype) {
  // The product before the scale is some 30 times the output: float16 would overflow where outputs are large.
  constexpr double kHeadroom = 32;
  return at::mm(x.to(at::kFloat).div(kHeadroom).to(dtype), weight.to(dtype).t()).to(at::kFloat).mul(kHeadroom);
}

Tensor product(const Tensor& x, const Tensor& codes, const std::optional<Tensor>& residual, const Tensor& patterns,
               const Tensor& points, double residual_scale, at::ScalarType dtype, std::string isa) {
  check_isa(isa);
  Codes checked = check_codes(codes, residual, patterns, points, residual_scale);
  check_vectors(x, checked);
  if (x.size(0) > kLargestCudaBatch)
    return multiply_dense(x, decode(codes, residual, patterns, points, residual_scale, isa), dtype);
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

CudaTrellis trellis_of(const Tensor& codes, int64_t rows, int64_t columns, int64_t rate, const Tensor& table,
                       const std::optional<Tensor>& masks) {
  TORCH_CHECK_VALUE(rate >= 1 && rate <= 6 && rows > 0 && columns > 0 && codes.dim() == 1 && codes.is_contiguous() &&
                        codes.scalar_type() == at::kByte && codes.size(0) == (rows * columns * rate + 7) / 8,
                    "codes of ", rows, "x", columns, " weights of 1 to 6 bits are a uint8 vector of just as many bits");
  TORCH_CHECK_VALUE(table.dim() == 1 && table.scalar_type() == at::kChar && table.is_contiguous() &&
                        table.device() == codes.device(),
                    "a table is an int8 vector on the device of the codes");
  int64_t size = table.size(0);
  TORCH_CHECK_VALUE(!masks || (masks->dim() == 1 && masks->scalar_type() == at::kByte && masks->is_contiguous() &&
                               masks->size(0) <= 8 && size == int64_t{1} << masks->size(0) &&
                               masks->device() == codes.device()),
                    "up to 8 masks, uint8 on the device of the codes, and a table of 2^(their number) entries");
  int states = 8;
  while (!masks && states < kMostStates && int64_t{1} << states < size) states++;
  TORCH_CHECK_VALUE(masks || size == int64_t{1} << states, "a table without masks has 2^8 to 2^12 entries");
  return {codes.const_data_ptr<uint8_t>(),
          table.const_data_ptr<int8_t>(),
          masks ? masks->const_data_ptr<uint8_t>() : nullptr,
          static_cast<int>(rate),
          states,
          masks ? static_cast<int>(masks->size(0)) : 0,
          rows,
          columns};
}

Tensor trellis_decode(const Tensor& codes, int64_t rows, int64_t columns, int64_t rate, const Tensor& table,
                      const std::optional<Tensor>& masks, std::string isa) {
  check_isa(isa);
  CudaTrellis m = trellis_of(codes, rows, columns, rate, table, masks);
  c10::cuda::CUDAGuard guard(codes.device());
  Tensor out = at::empty({rows, columns}, codes.options().dtype(at::kFloat));
  C10_CUDA_CHECK(cuda_trellis_decode(m, out.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor trellis_product(const Tensor& x, const Tensor& codes, int64_t rows, int64_t rate, const Tensor& table,
                       const std::optional<Tensor>& masks, at::ScalarType dtype, std::string isa) {
  check_isa(isa);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_floating_point() && x.device() == codes.device(), "x is a matrix of vectors");
  int64_t batch = x.size(0), columns = x.size(1);
  CudaTrellis m = trellis_of(codes, rows, columns, rate, table, masks);
  if (batch > kLargestCudaBatch) return multiply_dense(x, trellis_decode(codes, rows, columns, rate, table, masks, isa), dtype);
  c10::cuda::CUDAGuard guard(codes.device());
  if (batch == 0) return at::empty({0, rows}, x.options().dtype(at::kFloat));
  int64_t whole = 1;
  while (whole < batch) whole *= 2;
  int64_t stride = (columns + kCudaWay - 1) / kCudaWay * kCudaWay, parts = cuda_trellis_parts(m);
  Tensor vectors = at::constant_pad_nd(x.to(at::kFloat), {0, stride - columns, 0, whole - batch}).contiguous();
  Tensor sums = at::empty({parts, whole, rows}, vectors.options());
  C10_CUDA_CHECK(cuda_trellis_product(m, vectors.const_data_ptr<float>(), stride, whole, parts,
                                      sums.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return sums.sum(0).narrow(0, 0, batch).contiguous();
}

// words: the codebooks in float32, which the matrix points into.
CudaAQLM aqlm_of(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t columns, int64_t bits,
                 Tensor& words) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 16 && columns > 0 && codebooks.dim() == 3 && codebooks.size(0) > 0 &&
                        codebooks.size(1) == int64_t{1} << bits && codebooks.size(2) > 0 && codebooks.size(2) <= 32 &&
                        codebooks.scalar_type() == at::kHalf && codebooks.device() == codes.device(),
                    "codebooks are a float16 tensor (codebooks, ", int64_t{1} << bits, ", group) on the device of the codes");
  int64_t group = codebooks.size(2), groups = (columns + group - 1) / group;
  int64_t bytes = (groups * codebooks.size(0) * bits + 7) / 8;
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kByte && codes.is_contiguous() && codes.size(0) > 0 &&
                        codes.size(1) == bytes,
                    "codes of ", columns, " columns are a uint8 matrix (out, ", bytes, ")");
  TORCH_CHECK_VALUE(scales.dim() == 1 && scales.scalar_type() == at::kHalf && scales.size(0) == codes.size(0) &&
                        scales.device() == codes.device(),
                    "scales are ", codes.size(0), " numbers of float16 on the device of the codes");
  words = codebooks.to(at::kFloat).contiguous();
  return {codes.const_data_ptr<uint8_t>(),
          words.const_data_ptr<float>(),
          static_cast<int>(bits),
          static_cast<int>(codebooks.size(0)),
          static_cast<int>(group),
          codes.size(0),
          columns,
          bytes,
          groups};
}

Tensor aqlm_decode(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t columns, int64_t bits,
                   std::string isa) {
  check_isa(isa);
  c10::cuda::CUDAGuard guard(codes.device());
  Tensor words;
  CudaAQLM m = aqlm_of(codes, codebooks, scales, columns, bits, words);
  Tensor out = at::empty({m.rows, columns}, words.options());
  C10_CUDA_CHECK(cuda_aqlm_decode(m, out.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return out.mul_(scales.to(at::kFloat).unsqueeze(1));
}

Tensor aqlm_layer(const Tensor& x, const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t bits,
                  const std::optional<Tensor>& bias, bool, std::string isa) {
  check_isa(isa);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point() && x.device() == codes.device(),
                    "x is of floats on the device of the codes and ends in the inputs");
  c10::cuda::CUDAGuard guard(codes.device());
  int64_t columns = x.size(-1), batch = columns ? x.numel() / columns : 0;
  if (batch == 0 || batch > kLargestCudaBatch) {
    Tensor weight = aqlm_decode(codes, codebooks, scales, columns, bits, isa).to(x.scalar_type());
    return at::linear(x, weight, bias ? std::optional<Tensor>(bias->to(x.scalar_type())) : std::nullopt);
  }
  Tensor words;
  CudaAQLM m = aqlm_of(codes, codebooks, scales, columns, bits, words);
  Tensor vectors = x.reshape({batch, columns}).to(at::kFloat);
  vectors = at::constant_pad_nd(vectors, {0, m.groups * m.group - columns}).contiguous();
  Tensor y = at::empty({batch, m.rows}, words.options());
  C10_CUDA_CHECK(cuda_aqlm_product(m, vectors.const_data_ptr<float>(), batch, y.mutable_data_ptr<float>(),
                                   c10::cuda::getCurrentCUDAStream()));
  y.mul_(scales.to(at::kFloat));
  if (bias) y.add_(bias->to(at::kFloat));
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = m.rows;
  return y.to(x.scalar_type()).view(shape);
}

} // namespace

TORCH_LIBRARY_IMPL(quiptools, CUDA, library) {
  library.impl("decode", decode);
  library.impl("product", product);
  library.impl("trellis_decode", trellis_decode);
  library.impl("trellis_product", trellis_product);
  library.impl("aqlm_decode", aqlm_decode);
  library.impl("aqlm_layer", aqlm_layer);
}

} // namespace quiptools
