// Linear maps and routed experts. Every function here is called by all threads of a parallel
// region, shares its work among them and returns when all of it is done.
//
// Shapes: T tokens, E experts, F neurons of one expert, D model width, N slots sorted by expert.
// F and D are padded to whole registers; padded neurons and outputs are zero.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "activations.h"

namespace {

// The structs are mirrored, field by field, in structs.py.
struct Linear {
  const char* panels;  // [outputs / WIDE] panels of `inputs`
  const float* scale;  // [outputs] or null
  const float* bias;   // [outputs] or null
  int64_t inputs;
  int64_t outputs;  // padded
  int64_t format;
};

struct Experts {
  const char* up;    // [E, F / LANES] panels of D (gate lo, up hi), or [E, F / WIDE] when plain
  const char* down;  // [E, D / WIDE] panels of F
  const float* up_scale;    // per output of `up`, in panel order, or null
  const float* down_scale;  // [E, D] or null
  const float* up_bias;     // as up_scale
  const float* down_bias;   // [E, D] or null
  const float* neuron_limits;  // [E, F] or null: a neuron that does not exceed its own is zero
  const float* gate_limits;    // as that, of activated gates
  int64_t experts;
  int64_t width;   // F, padded
  int64_t inputs;  // D, not padded
  int64_t outputs;  // D, padded
  int64_t format;
  int64_t activation;
  int64_t gated;
};

// The order is that of `_FORMATS` in packed.py.
enum Format { FLOAT32, BFLOAT16, INT8, BFLOAT16_DOT };

template <class F>
inline void with_format(int64_t format, F f) {
  if (format == FLOAT32) f(Float32{});
  else if (format == BFLOAT16) f(BFloat16{});
#ifdef __AVX512BF16__
  else if (format == BFLOAT16_DOT) f(BFloat16Dot{});
#endif
  else f(Int8{});
}

// Rows as a format multiplies them: floats where they are, or a copy in bfloat16.
template <class W>
struct Rows {
  const typename W::Input* first;
  int64_t stride;
  const typename W::Input* operator[](int64_t t) const { return first + t * stride; }
};

// Words of a row in bfloat16. Rows a multiple of 1024 bytes apart would compete for few places of
// the cache.
inline int64_t rounded_words(int64_t inputs) {
  const int64_t words = (inputs + 1) / 2;
  return words % 256 ? words : words + 16;
}

// Words of scratch that rows of a format's inputs need.
inline int64_t scratch_words(int64_t format, int64_t T, int64_t inputs) {
  return format == BFLOAT16_DOT ? T * rounded_words(inputs) : 0;
}

// Puts a register of floats, as a format multiplies it, at a column of a row.
template <class W>
inline void put(typename W::Input* row, int64_t column, V v) {
  if constexpr (rounds<W>) {
    const __m256bh half = _mm512_cvtneps_pbh(bits<__m512>(v));
    std::memcpy(row + column / 2, &half, sizeof half);
  } else {
    store(row + column, v);
  }
}

// Called by all threads. `scratch` has as many words as scratch_words says; `ready` when it holds
// these rows already, from a call with a format that rounds.
template <class W>
inline Rows<W> rows_of(const float* x, int64_t stride, int64_t T, int64_t inputs,
                       uint32_t* scratch, bool ready) {
  if constexpr (rounds<W>) {
    const int64_t words = rounded_words(inputs);
    if (ready) return {scratch, words};
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      const float* from = x + t * stride;
      int64_t i = 0;
      for (; i + LANES <= inputs; i += LANES) put<W>(scratch + t * words, i, load(from + i));
      if (i == inputs) continue;
      V rest{};
      std::memcpy(&rest, from + i, (inputs - i) * sizeof(float));
      uint32_t last[LANES / 2];
      put<W>(last, 0, rest);
      std::copy_n(last, (inputs - i + 1) / 2, scratch + t * words + i / 2);
    }
    return {scratch, words};
  } else {
    return {x, stride};
  }
}

inline V scaled(V sum, const float* scale, const float* bias, int64_t at) {
  if (scale) sum *= load(scale + at);
  if (bias) sum += load(bias + at);
  return sum;
}

// Shares units of work among the threads. The work of few rows is to read memory: each thread
// reads one long run of it. That of many is shared in portions, so that a thread that is held up
// does not hold up all; of neighbours, since each fetches the next.
template <class F>
inline void share(int64_t units, int64_t rows, F f) {
  if (rows <= ROWS) {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
  } else {
    const int64_t portion = std::clamp<int64_t>(units / (8 * omp_get_num_threads()), 1, 16);
#pragma omp for schedule(dynamic, portion)
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
  }
}

// out_TO = x_TI W^T + bias, or added to out. `scratch` and `ready` as in rows_of.
inline void linear(const Linear& w, const float* x, int64_t stride, int64_t T, uint32_t* scratch,
                   float* out, int64_t out_stride, bool add, bool ready = false) {
  const int64_t panels = w.outputs / WIDE;
  with_format(w.format, [&](auto format) {
    using W = decltype(format);
    const Rows<W> inputs = rows_of<W>(x, stride, T, w.inputs, scratch, ready);
    const int64_t steps = steps_of<W>(w.inputs), size = steps * W::bytes;
    share(panels, T, [&](int64_t p) {
      const char* panel = w.panels + p * size;
      in_passes<W>(T, panel, panel + size, steps, [&](int64_t first, int rows, Fetch fetch) {
        with_rows(rows, [&](auto count) {
          constexpr int M = decltype(count)::value;
          const typename W::Input* a[M];
          V lo[M], hi[M];
          for (int m = 0; m < M; ++m) a[m] = inputs[first + m];
          multiply<W, M>(a, panel, steps, fetch, lo, hi);
          for (int m = 0; m < M; ++m) {
            float* y = out + (first + m) * out_stride + p * WIDE;
            lo[m] = scaled(lo[m], w.scale, w.bias, p * WIDE);
            hi[m] = scaled(hi[m], w.scale, w.bias, p * WIDE + LANES);
            store(y, add ? load(y) + lo[m] : lo[m]);
            store(y + LANES, add ? load(y + LANES) + hi[m] : hi[m]);
          }
        });
      });
    });
  });
}

// Zero where the magnitude does not exceed a limit; not-a-number stays.
inline V exceeding(V v, const float* limits, int64_t at) {
  if (!limits) return v;
  const V size = v < 0.0f ? -v : v;
  return size <= load(limits + at) ? V{} : v;
}

// The held slots of T tokens, sorted by expert and, within one, by token.
struct Slots {
  std::vector<int64_t> begin;  // [E + 1]
  std::vector<int32_t> token;  // [N]
  std::vector<float> weight;   // [N]
  std::vector<int64_t> used;   // experts that hold any

  int64_t count() const { return begin.back(); }

  // Turns the counts in begin[1..] into places; gives where each expert's slots start.
  std::vector<int64_t> place(int64_t E) {
    used.clear();
    for (int64_t e = 0; e < E; ++e) {
      if (begin[e + 1]) used.push_back(e);
      begin[e + 1] += begin[e];
    }
    token.resize(begin[E]);
    weight.resize(begin[E]);
    return {begin.begin(), begin.end() - 1};
  }

  // Ids outside [0, E) are empty slots; so is a weight of zero.
  void sort(const int64_t* ids, const float* weights, int64_t T, int64_t K, int64_t E) {
    begin.assign(E + 1, 0);
    auto held = [&](int64_t i) { return ids[i] >= 0 && ids[i] < E && weights[i] != 0.0f; };
    for (int64_t i = 0; i < T * K; ++i)
      if (held(i)) ++begin[ids[i] + 1];
    std::vector<int64_t> next = place(E);
    for (int64_t i = 0; i < T * K; ++i) {
      if (!held(i)) continue;
      const int64_t n = next[ids[i]]++;
      token[n] = static_cast<int32_t>(i / K);
      weight[n] = weights[i];
    }
  }

  // Weights of all experts for every token, rows `stride` apart; zero is no slot.
  void gather(const float* weights, int64_t stride, int64_t T, int64_t E) {
    begin.assign(E + 1, 0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t e = 0; e < E; ++e) begin[e + 1] += weights[t * stride + e] != 0.0f;
    std::vector<int64_t> next = place(E);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t e = 0; e < E; ++e) {
        if (weights[t * stride + e] == 0.0f) continue;
        token[next[e]] = static_cast<int32_t>(t);
        weight[next[e]++] = weights[t * stride + e];
      }
    }
  }

  // One expert for every token, at weight one.
  void all(int64_t T) {
    begin = {0, T};
    used = {0};
    token.resize(T);
    weight.assign(T, 1.0f);
    for (int64_t t = 0; t < T; ++t) token[t] = static_cast<int32_t>(t);
  }

  // out [T, E] becomes 1 where a token holds a slot of an expert.
  void mark(uint8_t* out, int64_t E) const {
    for (int64_t e : used) {
      if (e >= E) break;
      for (int64_t i = begin[e]; i < begin[e + 1]; ++i) out[token[i] * E + e] = 1;
    }
  }
};

// out_TD = sum over slots of weight * down(act(gate x) * (up x)), or added to out.
// `neurons` has room for [N, F] floats, `scratch` and `ready` are as in rows_of. Experts are added
// in ascending order.
inline void apply_experts(const Experts& e, const Slots& slots, const float* x, int64_t stride,
                          int64_t T, uint32_t* scratch, float* neurons, float* out,
                          int64_t out_stride, bool add, bool ready = false) {
  const int64_t F = e.width, per_panel = e.gated ? LANES : WIDE;
  const int64_t up_panels = F / per_panel, tiles = e.outputs / WIDE;
  with_format(e.format, [&](auto format) {
    using W = decltype(format);
    using Input = typename W::Input;
    const int64_t used = slots.used.size();
    const Rows<W> inputs = rows_of<W>(x, stride, T, e.inputs, scratch, ready);
    Input* middle = reinterpret_cast<Input*>(neurons);
    const int64_t middle_stride = rounds<W> ? rounded_words(F) : F;
    const int64_t up_steps = steps_of<W>(e.inputs), up_size = up_steps * W::bytes;
    const int64_t down_steps = steps_of<W>(F), down_size = down_steps * W::bytes;
    share(used * up_panels, T, [&](int64_t unit) {
      const int64_t expert = slots.used[unit / up_panels], p = unit % up_panels;
      const int64_t begin = slots.begin[expert], n = slots.begin[expert + 1] - begin;
      const int64_t index = expert * up_panels + p;
      const char* panel = e.up + index * up_size;
      in_passes<W>(n, panel, panel + up_size, up_steps, [&](int64_t first, int rows, Fetch fetch) {
        with_rows(rows, [&](auto count) {
          constexpr int M = decltype(count)::value;
          const Input* a[M];
          V lo[M], hi[M];
          for (int m = 0; m < M; ++m) a[m] = inputs[slots.token[begin + first + m]];
          multiply<W, M>(a, panel, up_steps, fetch, lo, hi);
          for (int m = 0; m < M; ++m) {
            const int64_t slot = begin + first + m;
            Input* y = middle + slot * middle_stride;
            lo[m] = scaled(lo[m], e.up_scale, e.up_bias, index * WIDE);
            hi[m] = scaled(hi[m], e.up_scale, e.up_bias, index * WIDE + LANES);
            const int64_t neuron = expert * F + p * per_panel;
            V act = activate(e.activation, lo[m]);
            if (e.gated) act = exceeding(act, e.gate_limits, neuron) * hi[m];
            act = exceeding(act, e.neuron_limits, neuron);
            put<W>(y, p * per_panel, act * slots.weight[slot]);
            if (!e.gated) {
              act = exceeding(activate(e.activation, hi[m]), e.neuron_limits, neuron + LANES);
              put<W>(y, p * per_panel + LANES, act * slots.weight[slot]);
            }
          }
        });
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
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
          const char* panel = e.down + (expert * tiles + tile) * down_size;
          const char* next = panel + down_size;
          in_passes<W>(n, panel, next, down_steps, [&](int64_t first, int rows, Fetch fetch) {
            with_rows(rows, [&](auto count) {
              constexpr int M = decltype(count)::value;
              const Input* a[M];
              V lo[M], hi[M];
              for (int m = 0; m < M; ++m) a[m] = middle + (begin + first + m) * middle_stride;
              multiply<W, M>(a, panel, down_steps, fetch, lo, hi);
              const int64_t at = expert * e.outputs + tile * WIDE;
              for (int m = 0; m < M; ++m) {
                const int64_t slot = begin + first + m;
                float* y = out + slots.token[slot] * out_stride + tile * WIDE;
                const float weight = slots.weight[slot];
                if (e.down_scale) {
                  lo[m] *= load(e.down_scale + at);
                  hi[m] *= load(e.down_scale + at + LANES);
                }
                if (e.down_bias) {
                  lo[m] += weight * load(e.down_bias + at);
                  hi[m] += weight * load(e.down_bias + at + LANES);
                }
                store(y, load(y) + lo[m]);
                store(y + LANES, load(y + LANES) + hi[m]);
              }
            });
          });
        }
      }
    });
  });
}

}  // namespace
