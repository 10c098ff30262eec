// Rounding with a trellis on CPUs: a block of columns, one sequence down the rows of each, as casp_quip_sharp.ldlq asks.
//
// Strips of rows are independent, so each goes through all columns of the block on one thread, whichever is free: the
// bytes do not depend on how many there are.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_trellis.h"

namespace quiptools {
namespace {

using at::Tensor;

const TrellisSearch& trellis_search(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && (isa.empty() || isa == "avx512")) return *avx512_trellis();
  if (avx2 && (isa.empty() || isa == "avx2")) return *avx2_trellis();
#endif
  TORCH_CHECK_VALUE(isa.empty() || isa == "portable", "this CPU does not run the instruction set ", isa);
  return *portable_trellis();
}

int reversed(int bits, int count) {
  int result = 0;
  for (int i = 0; i < count; ++i) result |= (bits >> i & 1) << (count - 1 - i);
  return result;
}

// The trellis of a table in the order of the stored states, whose newest bits are highest.
struct Table {
  std::vector<float> values;
  std::vector<uint8_t> symbols;
  Trellis trellis;

  Table(const Tensor& table, int64_t bits) {
    int64_t count = table.numel();
    int states = 0;
    while ((int64_t{1} << states) < count) ++states;
    TORCH_CHECK_VALUE(table.dim() == 1 && table.scalar_type() == at::kFloat && table.is_contiguous() &&
                          (int64_t{1} << states) == count && states >= 4 && states <= 16,
                      "a table is a float32 vector of a power of two of values, 16 to 65,536");
    TORCH_CHECK_VALUE(bits >= 1 && bits < states && bits <= 8, "a step reads 1 to 8 bits, fewer than a state has");
    const float* from = table.const_data_ptr<float>();
    for (int state = 0; state < count; ++state) {
      int stored = reversed(state, states);
      values.push_back(from[stored]);
      symbols.push_back(static_cast<uint8_t>(stored & ((1 << bits) - 1)));
    }
    trellis = {states, static_cast<int>(bits), values.data(), symbols.data()};
  }
};

// What one thread needs for strips of `length` rows and `width` columns.
struct Workspace {
  std::vector<float> before, after, found, moving, other;
  std::vector<uint8_t> decisions, symbols;
  std::vector<uint16_t> walk;
  TrellisScratch scratch;

  Workspace(const Trellis& trellis, int64_t length, int64_t width)
      : before((size_t{1} << (trellis.states - trellis.bits)) + 16), after(before.size()), found(length), moving(length * width), other(length * width),
        decisions(static_cast<size_t>(length) << (trellis.states - trellis.bits)), symbols(length), walk(length) {
    scratch = {{before.data(), after.data()}, decisions.data(), walk.data()};
  }
};

// Calls f(first row, rows, workspace) for every strip, on as many threads as there are.
template <class F>
void for_strips(int64_t rows, int64_t strip, int64_t width, const Trellis& trellis, const F& f) {
  int64_t strips = (rows + strip - 1) / strip;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(strips, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Workspace space(trellis, std::min(strip, rows), width);
      for (int64_t i = next++; i < strips; i = next++) f(i * strip, std::min(strip, rows - i * strip), space);
    }
  });
}

// Columns of a strip side by side in memory: (width, rows).
void gather(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; ++column) to[column * rows + row] = from[row * stride + column];
}

void check_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == at::kFloat &&
                        t.is_contiguous(),
                    "a float32 matrix of ", rows, " x ", columns, " without gaps is expected");
}

std::tuple<Tensor, Tensor> trellis_round(const Tensor& wanted, const Tensor& target, const Tensor& feedback,
                                         const Tensor& table, int64_t bits, int64_t strip, std::string isa) {
  int64_t rows = wanted.size(0), width = wanted.size(1);
  TORCH_CHECK_VALUE(strip > 0, "a strip has rows");
  check_matrix(wanted, rows, width);
  check_matrix(target, rows, width);
  check_matrix(feedback, width, width);
  Table known(table, bits);
  const TrellisSearch& search = trellis_search(isa);
  Tensor symbols = at::empty({rows, width}, wanted.options().dtype(at::kByte)), points = at::empty_like(wanted);
  uint8_t* codes = symbols.mutable_data_ptr<uint8_t>();
  float* out = points.mutable_data_ptr<float>();
  const float *moving = wanted.const_data_ptr<float>(), *goal = target.const_data_ptr<float>(),
              *factor = feedback.const_data_ptr<float>();
  for_strips(rows, strip, width, known.trellis, [&](int64_t first, int64_t count, Workspace& space) {
    gather(moving + first * width, width, count, width, space.moving.data());
    gather(goal + first * width, width, count, width, space.other.data());
    for (int64_t column = width; column-- > 0;) {
      float* error = space.other.data() + column * count;
      search.closed_walk(known.trellis, space.moving.data() + column * count, count, space.scratch,
                         space.symbols.data(), space.found.data());
      for (int64_t i = 0; i < count; ++i) {
        error[i] -= space.found[i];
        codes[(first + i) * width + column] = space.symbols[i];
        out[(first + i) * width + column] = space.found[i];
      }
      for (int64_t earlier = 0; earlier < column; ++earlier)
        search.add_scaled(space.moving.data() + earlier * count, error, factor[column * width + earlier], count);
    }
  });
  return {symbols, points};
}

std::tuple<Tensor, Tensor> trellis_descend(const Tensor& gradient, const Tensor& hessian, const Tensor& symbols,
                                           const Tensor& points, const Tensor& table, int64_t bits, int64_t strip,
                                           std::string isa) {
  int64_t rows = gradient.size(0), width = gradient.size(1);
  TORCH_CHECK_VALUE(strip > 0, "a strip has rows");
  check_matrix(gradient, rows, width);
  check_matrix(points, rows, width);
  check_matrix(hessian, width, width);
  TORCH_CHECK_VALUE(symbols.sizes() == gradient.sizes() && symbols.scalar_type() == at::kByte &&
                        symbols.is_contiguous(),
                    "symbols are a uint8 matrix of the gradient's shape without gaps");
  Table known(table, bits);
  const TrellisSearch& search = trellis_search(isa);
  Tensor found = symbols.clone(), moves = at::empty_like(gradient);
  uint8_t* codes = found.mutable_data_ptr<uint8_t>();
  float* out = moves.mutable_data_ptr<float>();
  const float *slope = gradient.const_data_ptr<float>(), *place = points.const_data_ptr<float>(),
              *curvature = hessian.const_data_ptr<float>();
  for_strips(rows, strip, width, known.trellis, [&](int64_t first, int64_t count, Workspace& space) {
    gather(slope + first * width, width, count, width, space.moving.data());
    gather(place + first * width, width, count, width, space.other.data());
    std::vector<float> wanted(count), move(count);
    for (int64_t column = width; column-- > 0;) {
      const float *pull = space.moving.data() + column * count, *now = space.other.data() + column * count;
      float diagonal = curvature[column * width + column];
      for (int64_t i = 0; i < count; ++i) wanted[i] = now[i] + pull[i] / diagonal;
      search.closed_walk(known.trellis, wanted.data(), count, space.scratch, space.symbols.data(), space.found.data());
      double gain = 0;
      for (int64_t i = 0; i < count; ++i) {
        move[i] = space.found[i] - now[i];
        gain += move[i] * (2 * pull[i] - move[i] * diagonal);
      }
      bool better = gain > 0;
      for (int64_t i = 0; i < count; ++i) {
        if (better) codes[(first + i) * width + column] = space.symbols[i];
        out[(first + i) * width + column] = better ? move[i] : 0;
      }
      if (!better) continue;
      for (int64_t earlier = 0; earlier < column; ++earlier)
        search.add_scaled(space.moving.data() + earlier * count, move.data(), -curvature[column * width + earlier],
                          count);
    }
  });
  return {found, moves};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(quiptools, library) {
  library.def(
      "trellis_round(Tensor wanted, Tensor target, Tensor feedback, Tensor table, int bits, int strip, str isa='') -> "
      "(Tensor, Tensor)");
  library.def(
      "trellis_descend(Tensor gradient, Tensor hessian, Tensor symbols, Tensor points, Tensor table, int bits, "
      "int strip, str isa='') -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(quiptools, CPU, library) {
  library.impl("trellis_round", trellis_round);
  library.impl("trellis_descend", trellis_descend);
}

} // namespace quiptools
