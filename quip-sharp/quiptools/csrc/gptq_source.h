// What all instruction sets compile from the same source. The including file sets the target and defines, within the
// namespace QUIPTOOLS_ISA: kLanes, the outputs of a register (8 or 16); Words, Ints and Floats, registers of them; and
//   Ints dot(Ints sums, Words bytes, const int8_t* x)     adds bytes[4 i + j] x[j] to lane i;
//   Ints bytes_of<bits>(const uint8_t* packed)            kLanes codes, eight to `bits` bytes;
//   Floats halves(const uint16_t* h)                      kLanes numbers of half precision.
#pragma once

namespace quiptools::QUIPTOOLS_ISA {
namespace {

// A multiply and an add stay two operations, so that every instruction set rounds alike.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// n lanes, zeros behind them.
template <class V, class T>
INLINE V load_lanes(const T* p, int64_t n) {
  V v = {};
  if (n >= kLanes) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    __builtin_memcpy(&v, p, n * sizeof(T));
  }
  return v;
}

template <class V, class T>
INLINE void store_lanes(T* p, V v, int64_t n) {
  if (n >= kLanes) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    __builtin_memcpy(p, &v, n * sizeof(T));
  }
}

INLINE Floats scales_of(const GPTQMatrix& m, int64_t group, int64_t o, int64_t n) {
  const uint16_t* place = m.scales + group * m.rows + o;
  if (n >= kLanes) return halves(place);
  uint16_t copy[kLanes] = {};
  __builtin_memcpy(copy, place, n * sizeof(uint16_t));
  return halves(copy);
}

template <int bits>
INLINE Ints zeros_of(const GPTQMatrix& m, int64_t group, int64_t o) {
  return bytes_of<bits>(m.zeros + group * m.zero_bytes + o / 8 * bits);
}

template <int bits>
INLINE Words quad_of(const Words* words, int quad) {
  if constexpr (bits == 3) {
    int at = 12 * quad, word = at / 32, shift = at % 32;
    Words twelve = words[word] >> shift;
    if (shift > 20) twelve |= words[word + 1] << (32 - shift);
    Words pairs = (twelve & 0x3F) | (twelve & 0xFC0) << 10;
    return (pairs & 0x00070007) | (pairs & 0x00380038) << 5;
  } else {
    constexpr int kToWord = 8 / bits;
    return words[quad / kToWord] >> quad % kToWord * bits & ((1u << bits) - 1) * 0x01010101u;
  }
}

// One block, one register of outputs, `count` vectors from `v` on.
template <int bits, int count>
INLINE void multiply_lanes(const GPTQMatrix& m, const GPTQBlock& block, int64_t number, int64_t blocks,
                           const GPTQVectors& x, int64_t v, int64_t o, int64_t n, float* y) {
  Ints sums[count][2] = {};
  const uint32_t* place = m.words + block.run * bits * m.rows + o;
  const int8_t* xs = x.planes + 2 * v * x.stride + kRun * block.place;
  int64_t next = block.runs * bits * m.rows; // the block after this one
  for (int64_t r = 0; r < block.runs; r++, xs += kRun) {
    Words words[bits];
#pragma GCC unroll 8
    for (int w = 0; w < bits; w++, place += m.rows) {
      words[w] = load_lanes<Words>(place, n);
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) + 4 * next));
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; q++) {
      Words quad = quad_of<bits>(words, q);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * count; i++) sums[i / 2][i % 2] = dot(sums[i / 2][i % 2], quad, xs + i * x.stride + 4 * q);
    }
  }
  Ints zeros = zeros_of<bits>(m, block.group, o);
  Floats scales = scales_of(m, block.group, o, n);
  for (int i = 0; i < count; i++) {
    int64_t at = (v + i) * blocks + number;
    Ints whole = sums[i][0] * kRadix + sums[i][1] - zeros * x.sums[at];
    float* out = y + (v + i) * m.rows + o;
    Floats part = __builtin_convertvector(whole, Floats) * (scales * x.steps[at]);
    store_lanes(out, load_lanes<Floats>(out, n) + part, n);
  }
}

template <int bits, int count>
void multiply_vectors(const GPTQMatrix& m, const GPTQBlock* blocks, int64_t number, const GPTQVectors& x, int64_t v,
                      int64_t begin, int64_t end, float* y) {
  int64_t whole = begin + (end - begin) / kLanes * kLanes;
  for (int64_t b = 0; b < number; b++) {
    for (int64_t o = begin; o < whole; o += kLanes)
      multiply_lanes<bits, count>(m, blocks[b], b, number, x, v, o, kLanes, y);
    if (whole < end) multiply_lanes<bits, count>(m, blocks[b], b, number, x, v, whole, end - whole, y);
  }
}

template <int bits>
void product_bits(const GPTQMatrix& m, const GPTQBlock* blocks, int64_t number, const GPTQVectors& x, int64_t begin,
                  int64_t end, float* y) {
  int64_t v = 0;
  for (; v + kMostVectors <= x.count; v += kMostVectors)
    multiply_vectors<bits, kMostVectors>(m, blocks, number, x, v, begin, end, y);
  for (; v + 2 <= x.count; v += 2) multiply_vectors<bits, 2>(m, blocks, number, x, v, begin, end, y);
  for (; v < x.count; v++) multiply_vectors<bits, 1>(m, blocks, number, x, v, begin, end, y);
}

void product(const GPTQMatrix& m, const GPTQBlock* blocks, int64_t number, const GPTQVectors& x, int64_t begin,
             int64_t end, float* y) {
  switch (m.bits) {
    case 2: return product_bits<2>(m, blocks, number, x, begin, end, y);
    case 3: return product_bits<3>(m, blocks, number, x, begin, end, y);
    case 4: return product_bits<4>(m, blocks, number, x, begin, end, y);
    default: return product_bits<8>(m, blocks, number, x, begin, end, y);
  }
}

typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

INLINE void put(float* p, Floats v, int64_t n) { store_lanes(p, v, n); }

// The nearest bfloat16.
INLINE void put(uint16_t* p, Floats v, int64_t n) {
  Words bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, is_nan = (Words)((bits & 0x7FFFFFFF) > 0x7F800000);
  store_lanes(p, __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7FC0), Half), n);
}

template <int bits, class T>
INLINE void decode_lanes(const GPTQMatrix& m, int64_t run, int64_t o, int64_t n, int64_t stride, T* out) {
  Words words[bits];
#pragma GCC unroll 8
  for (int w = 0; w < bits; w++) words[w] = load_lanes<Words>(m.words + (run * bits + w) * m.rows + o, n);
  int64_t column = kRun * run, group = column / m.group, end = (group + 1) * m.group;
  Ints zeros = zeros_of<bits>(m, group, o);
  Floats scales = scales_of(m, group, o, n);
#pragma GCC unroll 32
  for (int i = 0; i < kRun; i++, column++, out += stride) {
    if (column == m.columns) return;
    if (column == end) {
      group++;
      end += m.group;
      zeros = zeros_of<bits>(m, group, o);
      scales = scales_of(m, group, o, n);
    }
    int at = i * bits, word = at / 32, shift = at % 32;
    Words code = words[word] >> shift;
    if (shift + bits > 32) code |= words[word + 1] << (32 - shift);
    Ints steps = (Ints)(code & ((1u << bits) - 1)) - zeros;
    put(out, __builtin_convertvector(steps, Floats) * scales, n);
  }
}

template <int bits, class T>
void decode_bits(const GPTQMatrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t stride, T* out) {
  for (int64_t run = first; run < last; run++, out += kRun * stride)
    for (int64_t o = begin; o < end; o += kLanes)
      decode_lanes<bits>(m, run, o, end - o < kLanes ? end - o : kLanes, stride, out + o - begin);
}

template <class T>
void decode_matrix(const GPTQMatrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t stride, T* out) {
  switch (m.bits) {
    case 2: return decode_bits<2>(m, first, last, begin, end, stride, out);
    case 3: return decode_bits<3>(m, first, last, begin, end, stride, out);
    case 4: return decode_bits<4>(m, first, last, begin, end, stride, out);
    default: return decode_bits<8>(m, first, last, begin, end, stride, out);
  }
}

constexpr GPTQKernels kKernels{product, decode_matrix<float>, decode_matrix<uint16_t>};

#if !defined(__clang__)
#pragma GCC pop_options
#endif

} // namespace
} // namespace quiptools::QUIPTOOLS_ISA
