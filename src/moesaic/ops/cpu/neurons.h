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
// Steps of a down row that a pass over the neurons of an expert adds up, for a token alone.
constexpr int RUN = LANES == 16 ? 8 : 3;
// Bytes that are fetched ahead of what is read.
constexpr int64_t AHEAD = 4096;

inline float sum_of(V v) {
  float parts[LANES];
  store(parts, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// A float as bfloat16 holds it, to the nearest, ties to even.
inline float as_bfloat16(float x) {
  uint32_t word = bits<uint32_t>(x);
  if (std::isnan(x)) return x;
  word += 0x7fff + ((word >> 16) & 1);
  return bits<float>(word & 0xffff0000u);
}

inline void fetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 3);
}

// Products of N neighbouring rows with M tokens, x [M, stride].
template <class W, int N, int M>
inline void dots(const char* row, int64_t row_bytes, int64_t steps, const float* x, int64_t stride,
                 float out[N][M]) {
  V lo[N][M], hi[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) lo[n][m] = hi[n][m] = V{};
  for (int64_t k = 0; k < steps; ++k, row += W::bytes, x += WIDE) {
    for (int n = 0; n < N; ++n) {
      const char* at = row + n * row_bytes;
      __builtin_prefetch(at + AHEAD, 0, 3);
      V wlo, whi;
      W::read(at, wlo, whi);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        lo[n][m] = fused(load(x + m * stride), wlo, lo[n][m]);
        hi[n][m] = fused(load(x + m * stride + LANES), whi, hi[n][m]);
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m) out[n][m] = sum_of(lo[n][m] + hi[n][m]);
}

// What a thread has in hand: inputs as they are multiplied, and the numbers of kept neurons.
struct Hand {
  std::vector<float> x;
  std::vector<int64_t> kept;
};

// Copies the inputs of M slots, without what is small, filled up with zeros to whole steps.
inline void take_inputs(const Experts& e, const Slots& slots, int64_t first, int M, const float* x,
                        int64_t stride, Hand& hand) {
  const int64_t wide = (e.inputs + WIDE - 1) / WIDE * WIDE;
  hand.x.assign(M * wide, 0.0f);
  for (int m = 0; m < M; ++m) {
    const float* from = x + slots.token[first + m] * stride;
    float* to = hand.x.data() + m * wide;
    const bool rounded = e.format == BFLOAT16_DOT;
    for (int64_t i = 0; i < e.inputs; ++i) {
      const float value = rounded ? as_bfloat16(from[i]) : from[i];
      // Not-a-number stays.
      to[i] = std::fabs(value) <= e.input_limit ? 0.0f : value;
    }
  }
}

// Neurons [M, F] of a group of one expert, times the weights of their slots, zero where small.
template <class W, int M>
inline void group_neurons(const Experts& e, int64_t expert, int64_t first_neuron,
                          const Slots& slots, int64_t first_slot, const Hand& hand, float* out) {
  const int64_t F = e.width, steps = (e.inputs + WIDE - 1) / WIDE, bytes = steps * W::bytes;
  const int64_t size = std::min<int64_t>(GROUP, F - first_neuron), rows = e.gated ? 2 * F : F;
  const int64_t first_row = expert * rows + first_neuron, stride = steps * WIDE;
  const char* row = e.up + first_row * bytes;
  const float *limit = e.neuron_limits + expert * F + first_neuron,
              *gate_limit = e.gate_limits ? e.gate_limits + expert * F + first_neuron : nullptr;
  auto finished = [&](float sum, int64_t at) {
    if (e.up_scale) sum *= e.up_scale[at];
    return e.up_bias ? sum + e.up_bias[at] : sum;
  };
  float gates[M][GROUP] = {}, acts[M][GROUP];
  int64_t n = 0;
  for (; n + 2 <= size && M <= 2; n += 2) {
    float sums[2][M];
    dots<W, 2, M>(row + n * bytes, bytes, steps, hand.x.data(), stride, sums);
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2; ++i) gates[m][n + i] = finished(sums[i][m], first_row + n + i);
  }
  for (; n < size; ++n) {
    float sums[1][M];
    dots<W, 1, M>(row + n * bytes, bytes, steps, hand.x.data(), stride, sums);
    for (int m = 0; m < M; ++m) gates[m][n] = finished(sums[0][m], first_row + n);
  }
  for (int m = 0; m < M; ++m) store(acts[m], activate(e.activation, load(gates[m])));

  auto put = [&](int m, int64_t neuron, float a) {
    const int64_t slot = first_slot + m;
    a = std::fabs(a) <= limit[neuron] ? 0.0f : a * slots.weight[slot];
    out[m * F + neuron] = e.format == BFLOAT16_DOT ? as_bfloat16(a) : a;
  };
  if (!e.gated) {
    for (int m = 0; m < M; ++m)
      for (n = 0; n < size; ++n) put(m, n, acts[m][n]);
    return;
  }
  row += F * bytes;
  int64_t kept[GROUP], count = 0;
  for (n = 0; n < size; ++n) {
    bool any = false;
    for (int m = 0; m < M; ++m) {
      if (gate_limit && std::fabs(acts[m][n]) <= gate_limit[n]) acts[m][n] = 0.0f;
      any |= acts[m][n] != 0.0f;
    }
    if (any) kept[count++] = n;
    else
      for (int m = 0; m < M; ++m) out[m * F + n] = 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) {
    n = kept[i];
    if (i + 2 < count) fetch_row(row + kept[i + 2] * bytes, std::min<int64_t>(bytes, 2048));
    float sums[1][M];
    dots<W, 1, M>(row + n * bytes, bytes, steps, hand.x.data(), stride, sums);
    for (int m = 0; m < M; ++m) put(m, n, acts[m][n] * finished(sums[0][m], first_row + F + n));
  }
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
inline void add_rows(const Experts& e, int64_t expert, int64_t first, int64_t last, const float* a,
                     float weight, const std::vector<int64_t>& kept, float* out) {
  const int64_t bytes = e.outputs / WIDE * W::bytes, count = kept.size();
  const char* down = e.down + expert * e.width * bytes;
  for (int64_t step = first; step < last; step += RUN) {
    const int run = static_cast<int>(std::min<int64_t>(RUN, last - step));
    V lo[RUN] = {}, hi[RUN] = {};
    for (int64_t i = 0; i < count; ++i) {
      const char* row = down + kept[i] * bytes + step * W::bytes;
      if (i + 4 < count) fetch_row(down + kept[i + 4] * bytes + step * W::bytes, run * W::bytes);
#pragma GCC unroll 8
      for (int r = 0; r < RUN; ++r) {
        if (r >= run) break;
        V wlo, whi;
        W::read(row + r * W::bytes, wlo, whi);
        lo[r] = fused(a[kept[i]], wlo, lo[r]);
        hi[r] = fused(a[kept[i]], whi, hi[r]);
      }
    }
    for (int r = 0; r < run; ++r)
      finish_output(e, expert, step + r, lo[r], hi[r], weight, out + (step + r) * WIDE);
  }
}

// As apply_panels, for experts with thresholds.
inline void apply_neurons(const Experts& e, const Slots& slots, const float* x, int64_t x_stride,
                          int64_t T, float* neurons, float* out, int64_t out_stride, bool add) {
  const int64_t F = e.width, groups = (F + GROUP - 1) / GROUP, tiles = e.outputs / WIDE;
  thread_local Hand hand;
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
      for (int64_t first = begin; first < begin + n; first += ROWS) {
        const int rows = static_cast<int>(std::min<int64_t>(ROWS, begin + n - first));
        take_inputs(e, slots, first, rows, x, x_stride, hand);
        with_rows(rows, [&](auto count) {
          group_neurons<W, decltype(count)::value>(e, expert, first_neuron, slots, first, hand,
                                                   neurons + first * F + first_neuron);
        });
      }
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
        const int64_t bytes = tiles * W::bytes;
        if (n == 1) {
          const float* a = neurons + begin * F;
          hand.kept.clear();
          for (int64_t k = 0; k < F; ++k)
            if (a[k] != 0.0f) hand.kept.push_back(k);
          add_rows<W>(e, expert, first_tile, last_tile, a, slots.weight[begin], hand.kept,
                      out + slots.token[begin] * out_stride);
          continue;
        }
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const char* panel = e.down + expert * F * bytes + tile * W::bytes;
          for (int64_t first = begin; first < begin + n; first += ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(ROWS, begin + n - first));
            with_rows(rows, [&](auto count) {
              constexpr int M = decltype(count)::value;
              const float* a = neurons + first * F;
              V lo[M] = {}, hi[M] = {};
              const char* row = panel;
              for (int64_t k = 0; k < F; ++k, row += bytes) {
                V wlo, whi;
                W::read(row, wlo, whi);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m) {
                  lo[m] = fused(a[m * F + k], wlo, lo[m]);
                  hi[m] = fused(a[m * F + k], whi, hi[m]);
                }
              }
              for (int m = 0; m < M; ++m)
                finish_output(e, expert, tile, lo[m], hi[m], slots.weight[first + m],
                              out + slots.token[first + m] * out_stride + tile * WIDE);
            });
          }
        }
      }
    });
  });
}

// out_TD = sum over slots of weight * down(act(gate x) * (up x)), or added to out; see apply_panels.
inline void apply_experts(const Experts& e, const Slots& slots, const float* x, int64_t stride,
                          int64_t T, uint32_t* scratch, float* neurons, float* out,
                          int64_t out_stride, bool add, bool ready = false) {
  if (e.neuron_limits) apply_neurons(e, slots, x, stride, T, neurons, out, out_stride, add);
  else apply_panels(e, slots, x, stride, T, scratch, neurons, out, out_stride, add, ready);
}

// Whether scratch holds the rounded inputs of experts that were applied.
inline bool leaves_rounded(const Experts& e) {
  return e.format == BFLOAT16_DOT && !e.neuron_limits;
}

}  // namespace
