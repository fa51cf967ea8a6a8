// Products of a few rows with a panel of weights: the one inner loop of everything here.
//
// A panel holds the weights of two registers' worth of outputs, "lo" and "hi", for all inputs, one
// step of inputs after another. It is read once, in order, whatever the number of rows, so a product of few
// rows runs at memory bandwidth and one of many rows at the rate of the multipliers. Every output
// is one sum over the steps in ascending order: a row's result does not depend on the rows beside it.
//
// Vectors are GCC's portable ones, of the size of the machine's registers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64;  // of a register
constexpr int ROWS = 12;   // rows per pass: their accumulators, two registers each, must fit
#else
constexpr int BYTES = 32;
constexpr int ROWS = 5;
#endif
constexpr int LANES = BYTES / 4;
constexpr int WIDE = 2 * LANES;  // outputs of a panel

typedef float V __attribute__((vector_size(BYTES)));
typedef int32_t VI __attribute__((vector_size(BYTES)));
typedef float VU __attribute__((vector_size(BYTES), aligned(4)));

inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
inline V splat(float x) { return x - V{}; }
template <class To, class From>
inline To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "a change of type, not of size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c, rounded once. Said outright and never left to the compiler, which would fuse in one
// place and not in another: results would then depend on the number of rows.
inline V fused(float a, V b, V c) {
#ifdef __AVX512F__
  return bits<V>(_mm512_fmadd_ps(_mm512_set1_ps(a), bits<__m512>(b), bits<__m512>(c)));
#else
  return bits<V>(_mm256_fmadd_ps(_mm256_set1_ps(a), bits<__m256>(b), bits<__m256>(c)));
#endif
}

// What a step multiplies, per format. Most take one input, in float32.
struct OfFloats {
  using Input = float;
  static constexpr int inputs = 1;
  static inline V add_product(float a, V w, V sum) { return fused(a, w, sum); }
};

// float: lo, then hi.
struct Float32 : OfFloats {
  static constexpr int bytes = 2 * BYTES;
  static inline void read(const char* p, V& lo, V& hi) {
    lo = load(reinterpret_cast<const float*>(p));
    hi = load(reinterpret_cast<const float*>(p) + LANES);
  }
};

// bfloat16: words of 32 bits, lo in the lower half; a float is its upper 16 bits.
struct BFloat16 : OfFloats {
  static constexpr int bytes = BYTES;
  static inline void read(const char* p, V& lo, V& hi) {
    VI both;
    std::memcpy(&both, p, sizeof both);
    lo = bits<V>(both << 16);
    hi = bits<V>(both & static_cast<int32_t>(0xffff0000));
  }
};

// int8: lo, then hi; the scale of an output is applied to its sum.
struct Int8 : OfFloats {
  static constexpr int bytes = WIDE;
  static inline void read(const char* p, V& lo, V& hi) {
    lo = widen(p);
    hi = widen(p + LANES);
  }
  static inline V widen(const char* p) {
#ifdef __AVX512F__
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bits<V>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)));
#else
    const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return bits<V>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)));
#endif
  }
};

#ifdef __AVX512BF16__
// bfloat16 times bfloat16, two neighbouring inputs a step and a word: lo, then hi.
struct BFloat16Dot {
  using Input = uint32_t;
  static constexpr int inputs = 2;
  static constexpr int bytes = 2 * BYTES;
  static inline void read(const char* p, V& lo, V& hi) { Float32::read(p, lo, hi); }
  static inline V add_product(uint32_t a, V w, V sum) {
    return bits<V>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(_mm512_set1_epi32(a)),
                                    bits<__m512bh>(w)));
  }
};
#endif

template <class W>
constexpr bool rounds = !std::is_same_v<typename W::Input, float>;

// Steps that a number of inputs takes.
template <class W>
constexpr int64_t steps_of(int64_t inputs) {
  return (inputs + W::inputs - 1) / W::inputs;
}

// What a pass over a panel brings into the cache on the way: from where, and how far from one
// step to the next.
struct Fetch {
  const char* from;
  int64_t step;
};

// Not inlined: what surrounds the loop must not compete with it for registers.
template <class W, int M>
__attribute__((noinline)) void multiply(const typename W::Input* const* rows, const char* panel,
                                        int64_t steps, Fetch fetch, V* out_lo, V* out_hi) {
  const typename W::Input* a[M];
  V lo[M], hi[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) a[m] = rows[m], lo[m] = V{}, hi[m] = V{};
  for (int64_t k = 0; k < steps; ++k, panel += W::bytes, fetch.from += fetch.step) {
    __builtin_prefetch(fetch.from, 0, 2);
    if constexpr (W::bytes > 64) __builtin_prefetch(fetch.from + 64, 0, 2);
    V wlo, whi;
    W::read(panel, wlo, whi);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      lo[m] = W::add_product(a[m][k], wlo, lo[m]);
      hi[m] = W::add_product(a[m][k], whi, hi[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) out_lo[m] = lo[m], out_hi[m] = hi[m];
}

// Calls f with the number of rows as a constant.
template <int M = ROWS, class F>
inline void with_rows(int rows, F f) {
  if constexpr (M > 0) {
    if (rows == M) {
      f(std::integral_constant<int, M>{});
    } else {
      with_rows<M - 1>(rows, f);
    }
  }
}

// Splits n rows into passes over a panel of so many steps, of nearly equal size: f(first, rows, fetch).
// A single pass fetches a little ahead of itself. Several find their panel in the cache, and each
// fetches its part of the next, so that memory works all the while that the multipliers do.
template <class W, class F>
inline void in_passes(int64_t n, const char* panel, const char* next, int64_t steps, F f) {
  constexpr int64_t NEAR = 5120;
  const int64_t passes = (n + ROWS - 1) / ROWS, size = steps * W::bytes;
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t first = n * p / passes;
    const Fetch fetch = passes == 1 ? Fetch{panel + NEAR, W::bytes}
                                    : Fetch{next + size * p / passes, W::bytes / passes};
    f(first, static_cast<int>(n * (p + 1) / passes - first), fetch);
  }
}

}  // namespace
