#include "cpu_layer.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu_scratch.h"

namespace quiptools {
namespace {

using at::Tensor;

constexpr int64_t kWorthTiles = 8; // vectors that make up for laying out tiles

// What multiplies a side's coordinates: the vector, its scale, and what the transform leaves to be multiplied by.
std::vector<float> factors_of(const Rotation& side, const Kernels& kernels) {
  int64_t width = side.transform.width;
  std::vector<float> found(width);
  float scale = side.transform.rest();
  if (side.scale) scale *= side.scale->item<float>();
  if (side.vector.scalar_type() == at::kByte) {
    kernels.signs(side.vector.const_data_ptr<uint8_t>(), width, found.data());
    for (float& value : found) value *= scale;
  } else {
    std::fill(found.begin(), found.end(), scale);
    Tensor vector = side.vector.scalar_type() == at::kBFloat16 ? side.vector : side.vector.to(at::kFloat);
    if (vector.scalar_type() == at::kBFloat16) {
      kernels.load_bfloat16(reinterpret_cast<const uint16_t*>(vector.const_data_ptr<at::BFloat16>()), found.data(),
                            width, found.data());
    } else {
      kernels.load_floats(vector.const_data_ptr<float>(), found.data(), width, found.data());
    }
  }
  return found;
}

const uint16_t* bfloat16s(const Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr<at::BFloat16>()); }
uint16_t* mutable_bfloat16s(Tensor& t) { return reinterpret_cast<uint16_t*>(t.mutable_data_ptr<at::BFloat16>()); }

// The numbers of a vector of floats or bfloat16, times factors.
void load(const Tensor& x, int64_t vector, const float* factors, const Kernels& kernels, float* out) {
  int64_t n = x.size(1);
  if (x.scalar_type() == at::kFloat) {
    kernels.load_floats(x.const_data_ptr<float>() + vector * n, factors, n, out);
  } else {
    kernels.load_bfloat16(bfloat16s(x) + vector * n, factors, n, out);
  }
}

void store(const float* x, const Kernels& kernels, int64_t vector, Tensor& to) {
  int64_t n = to.size(1);
  if (to.scalar_type() == at::kFloat) {
    std::copy_n(x, n, to.mutable_data_ptr<float>() + vector * n);
  } else {
    kernels.store_bfloat16(x, n, mutable_bfloat16s(to) + vector * n);
  }
}

// What goes into the matrix: x (vectors, in), multiplied, transformed, to y (vectors, width).
struct InSide {
  InSide(const Rotation& side, const Kernels& kernels)
      : transform(side.transform), kernels(kernels), factors(factors_of(side, kernels)) {}

  // The vectors from `begin` on, as many as y has.
  void operator()(const Tensor& x, int64_t begin, Tensor& y) const {
    int64_t in = x.size(1), room = transform.room();
    for_vectors(y.size(0), [&](int64_t n) {
      float* work = scratch<Transform, float>(2 * room);
      load(x, begin + n, factors.data(), kernels, work);
      std::fill(work + in, work + transform.width, 0.0f);
      store(transform.apply(work, work + room), kernels, n, y);
    });
  }

  const Transform& transform;
  const Kernels& kernels;
  std::vector<float> factors;
};

// What comes out of it: z (vectors, width), transformed, multiplied, the bias added, to y (vectors, width).
struct OutSide {
  OutSide(const Rotation& side, const std::optional<Tensor>& bias, const Kernels& kernels)
      : transform(side.transform), kernels(kernels), factors(factors_of(side, kernels)), ones(side.transform.width, 1.0f),
        bias(bias ? bias->to(at::kFloat).contiguous() : Tensor()) {}

  // z's vectors become y's from `begin` on.
  void operator()(const Tensor& z, int64_t begin, Tensor& y) const {
    int64_t width = transform.width, room = transform.room();
    const float* constant = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
    for_vectors(z.size(0), [&](int64_t n) {
      float* work = scratch<Transform, float>(2 * room);
      load(z, n, ones.data(), kernels, work);
      float* found = transform.apply(work, work + room);
      kernels.load_floats(found, factors.data(), width, found);
      if (constant)
        for (int64_t i = 0; i < width; i++) found[i] += constant[i];
      store(found, kernels, begin + n, y);
    });
  }

  const Transform& transform;
  const Kernels& kernels;
  std::vector<float> factors, ones;
  Tensor bias;
};

} // namespace

Rotation read_rotation(const Tensor& vector, at::TensorList factors, int64_t power, const std::optional<Tensor>& scale,
                       Isa isa) {
  Transform transform = read_transform(factors, power, float_kernels(isa));
  bool packed = vector.scalar_type() == at::kByte;
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.is_contiguous() && vector.device().is_cpu() &&
                        (packed ? vector.size(0) * 8 >= transform.width
                                : vector.is_floating_point() && vector.size(0) == transform.width),
                    "a side's vector has ", transform.width, " floats, or as many packed signs");
  TORCH_CHECK_VALUE(!scale || scale->numel() == 1, "a scale is one number");
  return {std::move(transform), vector, scale};
}

Tensor rotated_layer(const Product& product, Rotation in, Rotation out, const Tensor& x,
                     const std::optional<Tensor>& bias, bool half, Isa isa) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point() && x.device().is_cpu() && x.size(-1) <= product.columns() &&
                        in.transform.width == product.columns() && out.transform.width == product.rows(),
                    "x ends in at most ", product.columns(), " floats, and the sides have the widths of the matrix");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == product.rows()), "a bias has ", product.rows(), " numbers");
  const Kernels& kernels = float_kernels(isa);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(product.rows());
  auto dtype = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  if (x.numel() == 0) return at::empty(shape, x.options()); // no vectors
  Tensor vectors = x.reshape({-1, x.size(-1)}).to(dtype).contiguous();
  int64_t count = vectors.size(0);
  if (isa == Isa::amx && count >= kWorthTiles && product.rounds()) {
    in.transform.use_tiles();
    out.transform.use_tiles();
  }
  InSide turn(in, kernels);
  OutSide turn_back(out, bias, kernels);
  Tensor y = at::empty({count, product.rows()}, vectors.options());
  if (product.is_direct(count)) {
    // A panel goes through all three before the next one, so that what lies between them stays in the cache.
    int64_t panel = product.panel(), most = std::min(count, panel);
    Tensor turned = at::empty({most, product.columns()}, x.options().dtype(at::kFloat));
    Tensor z = at::empty({most, product.rows()}, turned.options());
    for (int64_t begin = 0; begin < count; begin += panel) {
      int64_t here = std::min(panel, count - begin);
      Tensor part = turned.narrow(0, 0, here), found = z.narrow(0, 0, here);
      turn(vectors, begin, part);
      product.direct(part.const_data_ptr<float>(), here, found.mutable_data_ptr<float>());
      turn_back(found, begin, y);
    }
  } else {
    Tensor turned = at::empty({count, product.columns()}, vectors.options().dtype(half ? dtype : at::kFloat));
    turn(vectors, 0, turned);
    turn_back(multiply_decoded(product, turned), 0, y);
  }
  return y.to(x.scalar_type()).view(shape);
}

} // namespace quiptools
