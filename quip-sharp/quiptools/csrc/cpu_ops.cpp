// The CPU operators, as PyTorch sees them.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu_aqlm.h"
#include "cpu_e8p.h"
#include "cpu_gptq.h"
#include "cpu_layer.h"
#include "cpu_scratch.h"
#include "cpu_trellis_product.h"

namespace quiptools {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

Tensor e8p_product(const Tensor& x, const Tensor& codes, const Maybe& residual, const Tensor& patterns,
                   const Tensor& points, double residual_scale, at::ScalarType dtype, std::string isa) {
  Codes matrix = check_codes(codes, residual, patterns, points, residual_scale);
  return multiply(E8PProduct(matrix, dtype != at::kFloat, set_named(isa)), x, dtype);
}

Tensor e8p_decode(const Tensor& codes, const Maybe& residual, const Tensor& patterns, const Tensor& points,
                  double residual_scale, std::string isa) {
  E8PProduct matrix(check_codes(codes, residual, patterns, points, residual_scale), false, set_named(isa));
  return matrix.rows_decoded(0, matrix.rows(), at::kFloat, Tensor());
}

Tensor e8p_layer(const Tensor& x, const Tensor& codes, const Maybe& residual, const Tensor& patterns,
                 const Tensor& points, double residual_scale, const Tensor& in_vector, at::TensorList in_factors,
                 int64_t in_power, const Tensor& out_vector, at::TensorList out_factors, int64_t out_power,
                 const Maybe& scale, const Maybe& bias, bool half, std::string name) {
  Isa isa = set_named(name);
  bool rounds = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  E8PProduct matrix(check_codes(codes, residual, patterns, points, residual_scale), rounds, isa);
  return rotated_layer(matrix, read_rotation(in_vector, in_factors, in_power, std::nullopt, isa),
                       read_rotation(out_vector, out_factors, out_power, scale, isa), x, bias, half, isa);
}

Tensor trellis_product(const Tensor& x, const Tensor& codes, int64_t rows, int64_t rate, const Tensor& table,
                       const Maybe& masks, at::ScalarType dtype, std::string isa) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x is a matrix of vectors");
  return multiply(TrellisProduct(codes, rows, x.size(1), rate, table, masks, set_named(isa)), x, dtype);
}

Tensor trellis_decode(const Tensor& codes, int64_t rows, int64_t columns, int64_t rate, const Tensor& table,
                      const Maybe& masks, std::string isa) {
  return TrellisProduct(codes, rows, columns, rate, table, masks, set_named(isa)).decoded(0, rows, at::kFloat, Tensor()).t();
}

Tensor trellis_layer(const Tensor& x, const Tensor& codes, int64_t rate, const Tensor& table, const Maybe& masks,
                     const Tensor& in_vector, at::TensorList in_factors, int64_t in_power, const Tensor& out_vector,
                     at::TensorList out_factors, int64_t out_power, const Maybe& scale, const Maybe& bias, bool half,
                     std::string name) {
  Isa isa = set_named(name);
  Rotation in = read_rotation(in_vector, in_factors, in_power, std::nullopt, isa);
  Rotation out = read_rotation(out_vector, out_factors, out_power, scale, isa);
  TrellisProduct matrix(codes, out.transform.width, in.transform.width, rate, table, masks, isa);
  return rotated_layer(matrix, in, out, x, bias, half, isa);
}

Tensor gptq_decode(const Tensor& words, const Tensor& zeros, const Tensor& scales, int64_t columns, int64_t bits,
                   int64_t group_size, std::string isa) {
  GPTQProduct matrix(words, zeros, scales, columns, bits, group_size, set_named(isa));
  return matrix.decoded(0, matrix.rows(), at::kFloat, Tensor()).t();
}

Tensor gptq_layer(const Tensor& x, const Tensor& words, const Tensor& zeros, const Tensor& scales, int64_t bits,
                  int64_t group_size, const Maybe& bias, bool half, std::string isa) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x ends in the inputs");
  return plain_layer(GPTQProduct(words, zeros, scales, x.size(-1), bits, group_size, set_named(isa)), x, bias, half);
}

Tensor aqlm_decode(const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t columns, int64_t bits,
                   std::string isa) {
  AQLMProduct matrix(codes, codebooks, scales, columns, bits, false, set_named(isa));
  return matrix.decoded(0, matrix.rows(), at::kFloat, Tensor()).t().contiguous();
}

Tensor aqlm_layer(const Tensor& x, const Tensor& codes, const Tensor& codebooks, const Tensor& scales, int64_t bits,
                  const Maybe& bias, bool half, std::string isa) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x ends in the inputs");
  bool rounds = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  AQLMProduct matrix(codes, codebooks, scales, x.size(-1), bits, rounds, set_named(isa));
  return plain_layer(matrix, x, bias, half);
}

Tensor transform(const Tensor& x, at::TensorList factors, int64_t power, std::string isa) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat, "transform takes a float32 x (vectors, width)");
  Transform plan = read_transform(factors, power, float_kernels(set_named(isa)));
  TORCH_CHECK_VALUE(plan.width == x.size(1), "the factors make up a width of ", plan.width, ", x has ", x.size(1));
  Tensor source = x.contiguous(), y = at::empty_like(source);
  std::vector<float> norm(plan.width, plan.rest());
  const float* from = source.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  int64_t room = plan.room();
  for_vectors(x.size(0), [&](int64_t n) {
    float* work = scratch<Transform, float>(2 * room);
    plan.kernels->load_floats(from + n * plan.width, norm.data(), plan.width, work);
    std::copy_n(plan.apply(work, work + room), plan.width, to + n * plan.width);
  });
  return y;
}

Tensor unpack_signs(const Tensor& packed, int64_t size) {
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.scalar_type() == at::kByte && packed.is_contiguous() && size >= 0 &&
                        packed.size(0) * 8 >= size,
                    "packed signs are a uint8 vector with a bit for each of ", size, " coordinates");
  Tensor signs = at::empty({size}, packed.options().dtype(at::kFloat));
  float_kernels(usable_sets().front()).signs(packed.const_data_ptr<uint8_t>(), size, signs.mutable_data_ptr<float>());
  return signs;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Isa isa : usable_sets()) names.emplace_back(name_of(isa));
  return names;
}

// Whether this was compiled so that rows are shared among PyTorch's threads.
bool threaded() {
#ifdef INTRA_OP_PARALLEL
  return true;
#else
  return false;
#endif
}

} // namespace

TORCH_LIBRARY(quiptools, library) {
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("threaded() -> bool", threaded);
  library.def("unpack_signs(Tensor packed, int size) -> Tensor");
  library.def("transform(Tensor x, Tensor[] factors, int power, str isa='') -> Tensor");
#define E8P_MATRIX "Tensor codes, Tensor? residual, Tensor patterns, Tensor points, float residual_scale"
#define TRELLIS_CODE "int rate, Tensor table, Tensor? masks"
#define SIDES                                                                                             \
  "Tensor in_vector, Tensor[] in_factors, int in_power, Tensor out_vector, Tensor[] out_factors, int out_power, " \
  "Tensor? scale, Tensor? bias"
  library.def("decode(" E8P_MATRIX ", str isa='') -> Tensor");
  library.def("product(Tensor x, " E8P_MATRIX ", ScalarType dtype, str isa='') -> Tensor");
  library.def("layer(Tensor x, " E8P_MATRIX ", " SIDES ", bool half=False, str isa='') -> Tensor");
  library.def("trellis_decode(Tensor codes, int rows, int columns, " TRELLIS_CODE ", str isa='') -> Tensor");
  library.def("trellis_product(Tensor x, Tensor codes, int rows, " TRELLIS_CODE ", ScalarType dtype, str isa='') -> Tensor");
  library.def("trellis_layer(Tensor x, Tensor codes, " TRELLIS_CODE ", " SIDES ", bool half=False, str isa='') -> Tensor");
  library.def(
      "gptq_decode(Tensor words, Tensor zeros, Tensor scales, int columns, int bits, int group_size, str isa='') -> Tensor");
  library.def(
      "gptq_layer(Tensor x, Tensor words, Tensor zeros, Tensor scales, int bits, int group_size, Tensor? bias, "
      "bool half=False, str isa='') -> Tensor");
  library.def(
      "aqlm_decode(Tensor codes, Tensor codebooks, Tensor scales, int columns, int bits, str isa='') -> Tensor");
  library.def(
      "aqlm_layer(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, int bits, Tensor? bias, bool half=False, "
      "str isa='') -> Tensor");
}

TORCH_LIBRARY_IMPL(quiptools, CPU, library) {
  library.impl("unpack_signs", unpack_signs);
  library.impl("transform", transform);
  library.impl("decode", e8p_decode);
  library.impl("product", e8p_product);
  library.impl("layer", e8p_layer);
  library.impl("trellis_decode", trellis_decode);
  library.impl("trellis_product", trellis_product);
  library.impl("trellis_layer", trellis_layer);
  library.impl("gptq_decode", gptq_decode);
  library.impl("gptq_layer", gptq_layer);
  library.impl("aqlm_decode", aqlm_decode);
  library.impl("aqlm_layer", aqlm_layer);
}

} // namespace quiptools
