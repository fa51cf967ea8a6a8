// Experts whose neurons have thresholds: what does not exceed its own is not read for a token alone.
//
// Their weights lie neuron by neuron, so that what is read of one is one piece: a row of `up` is the
// gate or up row of a neuron, a row of `down` its row of the transposed down matrix, each in steps of
// WIDE values. Gates come first; where one is small the up row is passed over, and where the neuron
// is, its down row. Every sum is in one order whatever the number of tokens.

#pragma once

#include "experts.h"

namespace {

// Neurons whose gates are decided at a time: those of a register.
constexpr int GROUP = LANES;
// Rows of weights and tokens whose products are summed side by side: twice as many registers as
// their product.
constexpr int SIDE_ROWS = LANES == 16 ? 4 : 2, SIDE_TOKENS = LANES == 16 ? 3 : 2;
// Down rows that are added to the output of a token alone at a time.
constexpr int ADDED = 4;

inline float sum_of(V v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(bits<__m512>(v));
#else
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(bits<__m256>(v)),
                           _mm256_extractf128_ps(bits<__m256>(v), 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#endif
}

// Steps from one row of so many values to the next. Rows a multiple of 1024 bytes apart would
// compete for few places of the cache.
template <class W>
inline int64_t row_steps(int64_t values) {
  const int64_t steps = (values + WIDE - 1) / WIDE;
  return steps * W::bytes % 1024 ? steps : steps + 1;
}

// A float as bfloat16 holds it, to the nearest, ties to even.
inline float as_bfloat16(float x) {
  const uint32_t word = bits<uint32_t>(x);
  const float nearest = bits<float>((word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000u);
  return x == x ? nearest : x;
}

// Products of N rows of weights with the inputs of M tokens, out [N, M]; fetches N rows to come. Not
// inlined, as `multiply`.
template <class W, int N, int M>
__attribute__((noinline)) void dots(const char* const* rows, const char* const* to_come,
                                    int64_t steps, const float* const* inputs, float* out) {
  const char *w[N], *next[N];
  const float* x[M];
  V lo[N * M], hi[N * M];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) w[n] = rows[n], next[n] = to_come[n];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) x[m] = inputs[m];
#pragma GCC unroll 16
  for (int i = 0; i < N * M; ++i) lo[i] = hi[i] = V{};
  for (int64_t at = 0, at_x = 0; at < steps * W::bytes; at += W::bytes, at_x += WIDE) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(next[n] + at, 0, 3);
      if constexpr (W::bytes > 64) __builtin_prefetch(next[n] + at + 64, 0, 3);
      V wlo, whi;
      W::read(w[n] + at, wlo, whi);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        lo[n * M + m] = fused(load(x[m] + at_x), wlo, lo[n * M + m]);
        hi[n * M + m] = fused(load(x[m] + at_x + LANES), whi, hi[n * M + m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N * M; ++i) out[i] = sum_of(lo[i] + hi[i]);
}

// Sums of the rows of a transposed down matrix, each times the neuron of each of M tokens, over one
// step of columns: out [M, 2].
template <class W, int M>
__attribute__((noinline)) void sums_of_rows(const char* row, int64_t row_bytes, int64_t count,
                                            const float* a, int64_t stride, V* out) {
  V lo[M], hi[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) lo[m] = hi[m] = V{};
  for (int64_t k = 0; k < count; ++k, row += row_bytes) {
    V wlo, whi;
    W::read(row, wlo, whi);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float value = a[m * stride + k];
      lo[m] = fused(value, wlo, lo[m]);
      hi[m] = fused(value, whi, hi[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) out[2 * m] = lo[m], out[2 * m + 1] = hi[m];
}

// Adds N rows, each times a number, to sums over some steps; fetches N rows to come.
template <class W, int N>
__attribute__((noinline)) void add_rows(const char* const* rows, const char* const* to_come,
                                        int64_t steps, const float* factors, float* sums) {
  const char *w[N], *next[N];
  float a[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) w[n] = rows[n], next[n] = to_come[n], a[n] = factors[n];
  for (int64_t at = 0; at < steps * W::bytes; at += W::bytes, sums += WIDE) {
    V lo = load(sums), hi = load(sums + LANES);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(next[n] + at, 0, 3);
      if constexpr (W::bytes > 64) __builtin_prefetch(next[n] + at + 64, 0, 3);
      V wlo, whi;
      W::read(w[n] + at, wlo, whi);
      lo = fused(a[n], wlo, lo);
      hi = fused(a[n], whi, hi);
    }
    store(sums, lo);
    store(sums + LANES, hi);
  }
}

// Calls f(first, N) for runs of N of so many things, N at most MOST and constant.
template <int MOST, class F>
inline void in_runs(int64_t count, F f) {
  int64_t first = 0;
  for (; first + MOST <= count; first += MOST) f(first, std::integral_constant<int, MOST>{});
  if (first < count)
    with_rows<MOST>(static_cast<int>(count - first), [&](auto rest) { f(first, rest); });
}

// Floats from one row of inputs to the next.
inline int64_t wide_inputs(const Experts& e) { return row_steps<Float32>(e.inputs) * WIDE; }

// Words of scratch that experts need for the inputs of T tokens.
inline int64_t scratch_words(const Experts& e, int64_t T) {
  return e.neuron_limits ? T * wide_inputs(e) : scratch_words(e.format, T, e.inputs);
}

// Copies rows of inputs as they are multiplied: without what is small, filled up with zeros. Called
// by all threads.
inline void take_inputs(const Experts& e, const float* x, int64_t x_stride, int64_t T, float* to) {
  const int64_t wide = wide_inputs(e);
  const bool rounded = e.format == BFLOAT16_DOT;
  const float limit = static_cast<float>(e.input_limit);
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* from = x + t * x_stride;
    float* row = to + t * wide;
    for (int64_t i = 0; i < e.inputs; ++i) {
      const float value = rounded ? as_bfloat16(from[i]) : from[i];
      // Not-a-number stays.
      row[i] = std::fabs(value) <= limit ? 0.0f : value;
    }
    std::fill(row + e.inputs, row + wide, 0.0f);
  }
}

// Neurons of a group of one expert for M slots, out [M, F], times the weights of their slots, zero
// where small.
template <class W, int M>
inline void group_neurons(const Experts& e, int64_t expert, int64_t first_neuron,
                          const Slots& slots, int64_t first_slot, const float* inputs, float* out) {
  const int64_t F = e.width, steps = (e.inputs + WIDE - 1) / WIDE;
  const int64_t bytes = row_steps<W>(e.inputs) * W::bytes, wide = wide_inputs(e);
  const int64_t size = std::min<int64_t>(GROUP, F - first_neuron), rows = e.gated ? 2 * F : F;
  const float *limit = e.neuron_limits + expert * F + first_neuron,
              *gate_limit = e.gate_limits ? e.gate_limits + expert * F + first_neuron : nullptr;
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = inputs + slots.token[first_slot + m] * wide;

  // Products [GROUP, M] of some rows of the group, from a row of the whole matrix on.
  float sums[GROUP][M];
  auto multiply_rows = [&](int64_t first_row, const int64_t* which, int64_t count) {
    const char* matrix = e.up + first_row * bytes;
    in_runs<SIDE_ROWS>(count, [&](int64_t first, auto n) {
      constexpr int N = decltype(n)::value;
      const char *row[N], *next[N];
      float part[N * M];
      for (int i = 0; i < N; ++i) {
        row[i] = matrix + which[first + i] * bytes;
        next[i] = matrix + which[std::min<int64_t>(first + N + i, count - 1)] * bytes;
      }
      dots<W, N, M>(row, next, steps, x, part);
      for (int i = 0; i < N; ++i) {
        const int64_t at = first_row + which[first + i];
        for (int m = 0; m < M; ++m) {
          float sum = part[i * M + m];
          if (e.up_scale) sum *= e.up_scale[at];
          if (e.up_bias) sum += e.up_bias[at];
          sums[which[first + i]][m] = sum;
        }
      }
    });
  };
  auto put = [&](int m, int64_t n, float a) {
    a = std::fabs(a) <= limit[n] ? 0.0f : a * slots.weight[first_slot + m];
    out[m * F + n] = e.format == BFLOAT16_DOT ? as_bfloat16(a) : a;
  };

  int64_t which[GROUP], count = 0;
  for (int64_t n = 0; n < size; ++n) which[n] = n;
  const int64_t first_row = expert * rows + first_neuron;
  multiply_rows(first_row, which, size);
  float acts[M][GROUP] = {};
  for (int m = 0; m < M; ++m) {
    for (int64_t n = 0; n < size; ++n) acts[m][n] = sums[n][m];
    store(acts[m], activate(e.activation, load(acts[m])));
  }
  if (!e.gated) {
    for (int m = 0; m < M; ++m)
      for (int64_t n = 0; n < size; ++n) put(m, n, acts[m][n]);
    return;
  }
  for (int64_t n = 0; n < size; ++n) {
    bool any = false;
    for (int m = 0; m < M; ++m) {
      if (std::fabs(acts[m][n]) <= gate_limit[n]) acts[m][n] = 0.0f;
      out[m * F + n] = 0.0f;
      any |= acts[m][n] != 0.0f;
    }
    if (any) which[count++] = n;
  }
  multiply_rows(first_row + F, which, count);
  for (int64_t i = 0; i < count; ++i)
    for (int m = 0; m < M; ++m) put(m, which[i], acts[m][which[i]] * sums[which[i]][m]);
}

inline void finish_output(const Experts& e, int64_t expert, int64_t step, V lo, V hi, float weight,
                          float* y) {
  const int64_t at = expert * e.outputs + step * WIDE;
  if (e.down_scale) {
    lo *= load(e.down_scale + at);
    hi *= load(e.down_scale + at + LANES);
  }
  if (e.down_bias) {
    lo += weight * load(e.down_bias + at);
    hi += weight * load(e.down_bias + at + LANES);
  }
  store(y, load(y) + lo);
  store(y + LANES, load(y + LANES) + hi);
}

// Adds the outputs of steps [first, last) of one expert for a token alone: kept rows only.
template <class W>
inline void add_alone(const Experts& e, int64_t expert, int64_t first, int64_t last, const float* a,
                      float weight, float* out) {
  thread_local std::vector<int64_t> kept;
  thread_local std::vector<float> sums;
  kept.clear();
  for (int64_t k = 0; k < e.width; ++k)
    if (a[k] != 0.0f) kept.push_back(k);
  sums.assign((last - first) * WIDE, 0.0f);
  const int64_t bytes = row_steps<W>(e.outputs) * W::bytes, count = kept.size();
  const char* down = e.down + expert * e.width * bytes + first * W::bytes;
  in_runs<ADDED>(count, [&](int64_t at, auto n) {
    constexpr int N = decltype(n)::value;
    const char *row[N], *next[N];
    float factors[N];
    for (int i = 0; i < N; ++i) {
      row[i] = down + kept[at + i] * bytes;
      next[i] = down + kept[std::min<int64_t>(at + N + i, count - 1)] * bytes;
      factors[i] = a[kept[at + i]];
    }
    add_rows<W, N>(row, next, last - first, factors, sums.data());
  });
  for (int64_t step = first; step < last; ++step) {
    const float* sum = sums.data() + (step - first) * WIDE;
    finish_output(e, expert, step, load(sum), load(sum + LANES), weight, out + step * WIDE);
  }
}

// As apply_panels, for experts with thresholds.
inline void apply_neurons(const Experts& e, const Slots& slots, const float* x, int64_t x_stride,
                          int64_t T, float* inputs, float* neurons, float* out, int64_t out_stride,
                          bool add) {
  const int64_t F = e.width, groups = (F + GROUP - 1) / GROUP, tiles = e.outputs / WIDE;
  take_inputs(e, x, x_stride, T, inputs);
  auto with_float_format = [&](auto f) {
    if (e.format == FLOAT32) f(Float32{});
    else if (e.format == INT8) f(Int8{});
    else f(BFloat16{});
  };
  with_float_format([&](auto format) {
    using W = decltype(format);
    share(static_cast<int64_t>(slots.used.size()) * groups, T, [&](int64_t unit) {
      const int64_t expert = slots.used[unit / groups], first_neuron = unit % groups * GROUP;
      const int64_t begin = slots.begin[expert], n = slots.begin[expert + 1] - begin;
      in_runs<SIDE_TOKENS>(n, [&](int64_t first, auto count) {
        group_neurons<W, decltype(count)::value>(e, expert, first_neuron, slots, begin + first,
                                                 inputs,
                                                 neurons + (begin + first) * F + first_neuron);
      });
    });
    // A thread owns columns, so that sums need no other thread.
    const int64_t per_thread = T <= ROWS ? 1 : 4;
    const int64_t units = std::min<int64_t>(tiles, per_thread * omp_get_num_threads());
    share(units, T, [&](int64_t unit) {
      const int64_t first_tile = tiles * unit / units, last_tile = tiles * (unit + 1) / units;
      if (!add)
        for (int64_t t = 0; t < T; ++t)
          std::fill_n(out + t * out_stride + first_tile * WIDE, (last_tile - first_tile) * WIDE,
                      0.0f);
      for (const int64_t expert : slots.used) {
        const int64_t begin = slots.begin[expert], n = slots.begin[expert + 1] - begin;
        const int64_t bytes = row_steps<W>(e.outputs) * W::bytes;
        if (n == 1) {
          add_alone<W>(e, expert, first_tile, last_tile, neurons + begin * F, slots.weight[begin],
                       out + slots.token[begin] * out_stride);
          continue;
        }
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const char* row = e.down + expert * F * bytes + tile * W::bytes;
          in_runs<ROWS>(n, [&](int64_t first, auto count) {
            constexpr int M = decltype(count)::value;
            V sums[2 * M];
            sums_of_rows<W, M>(row, bytes, F, neurons + (begin + first) * F, F, sums);
            for (int m = 0; m < M; ++m) {
              const int64_t slot = begin + first + m;
              finish_output(e, expert, tile, sums[2 * m], sums[2 * m + 1], slots.weight[slot],
                            out + slots.token[slot] * out_stride + tile * WIDE);
            }
          });
        }
      }
    });
  });
}

// out_TD = sum over slots of weight * down(act(gate x) * (up x)), or added to out; see apply_panels.
inline void apply_experts(const Experts& e, const Slots& slots, const float* x, int64_t stride,
                          int64_t T, uint32_t* scratch, float* neurons, float* out,
                          int64_t out_stride, bool add, bool ready = false) {
  if (e.neuron_limits) {
    apply_neurons(e, slots, x, stride, T, reinterpret_cast<float*>(scratch), neurons, out,
                  out_stride, add);
    return;
  }
  apply_panels(e, slots, x, stride, T, scratch, neurons, out, out_stride, add, ready);
}

// Whether scratch holds the rounded inputs of experts that were applied.
inline bool leaves_rounded(const Experts& e) {
  return e.format == BFLOAT16_DOT && !e.neuron_limits;
}

}  // namespace
