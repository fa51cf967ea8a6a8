// The layers of a decoder over a cache of keys and values, for any mix of sequences: every row is
// a token with the sequence (slot of the cache) and the position that it has.
//
// Shapes: T rows, D model width, H heads, G key-value heads, C floats of a head.

#pragma once

#include <limits>

#include "ffn.h"

namespace {

// The structs are mirrored, field by field, in structs.py.
struct Attention {
  Linear qkv;           // rows of all queries, then keys, then values
  Linear out;
  const float* q_norm;  // [C], or [H C] when `norm_whole`, or null
  const float* k_norm;
  const float* cos;     // [length, rotary], or null: no rotation in this layer
  const float* sin;
  float* keys;          // [slots, G, length / WIDE] panels of C inputs: outputs are positions
  float* values;        // [slots, G, padded C / WIDE] panels of `length` inputs
  int64_t norm_whole;
  int64_t rotary;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t window;  // positions seen, itself included; 0: all
  double scale;
  double softcap;  // 0: none
};

struct Layer {
  const float* attention_norm;  // [D], before; or null
  const float* attention_post;  // after, before the sum; or null
  const float* ffn_norm;
  const float* ffn_post;
  double eps;
  Attention attention;
  Ffn ffn;
};

struct Batch {
  const int64_t* slot;      // [T]
  const int64_t* position;  // [T]
  const double* threshold;  // [T], or null; see route
  int64_t tokens;
  int64_t dim;
  int64_t stride;  // of rows of D floats
  int64_t length;  // positions that the cache holds, a multiple of WIDE
};

struct Workspace : FfnWork {
  std::vector<float> qkv, heads;
  std::vector<int64_t> runs;  // first rows of the runs of one sequence, and T
};

inline float sum(V v) {
  float total = 0.0f;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// y = x / rms(x) * weight, over n floats; in place too.
inline void rms_norm(const float* x, const float* weight, double eps, int64_t n, float* y) {
  V squares{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(n) + static_cast<float>(eps));
  for (i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

// x_T = norm(h_T), or a copy.
inline void norm_rows(const Batch& b, const float* weight, double eps, const float* h, float* x) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < b.tokens; ++t) {
    if (weight) rms_norm(h + t * b.stride, weight, eps, b.dim, x + t * b.stride);
    else std::copy_n(h + t * b.stride, b.dim, x + t * b.stride);
  }
}

// h_T += norm(y_T).
inline void add_normed(const Batch& b, const float* weight, double eps, float* y, float* h) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < b.tokens; ++t) {
    rms_norm(y + t * b.stride, weight, eps, b.dim, y + t * b.stride);
    for (int64_t i = 0; i < b.dim; ++i) h[t * b.stride + i] += y[t * b.stride + i];
  }
}

inline void rotate(const float* cos, const float* sin, int64_t rotary, float* x) {
  for (int64_t i = 0, half = rotary / 2; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

inline int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

// Normalises and rotates queries and keys, and puts keys and values into the cache.
inline void remember(const Attention& a, const Batch& b, double eps, float* qkv) {
  const int64_t C = a.head_dim, G = a.kv_heads;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < b.tokens; ++t) {
    float* q = qkv + t * a.qkv.outputs;
    float* k = q + a.heads * C;
    const float* v = k + G * C;
    const int64_t position = b.position[t];
    if (a.q_norm && a.norm_whole) {
      rms_norm(q, a.q_norm, eps, a.heads * C, q);
      rms_norm(k, a.k_norm, eps, G * C, k);
    } else if (a.q_norm) {
      for (int64_t i = 0; i < a.heads; ++i) rms_norm(q + i * C, a.q_norm, eps, C, q + i * C);
      for (int64_t i = 0; i < G; ++i) rms_norm(k + i * C, a.k_norm, eps, C, k + i * C);
    }
    if (a.cos)  // queries and keys follow each other
      for (int64_t i = 0; i < a.heads + G; ++i)
        rotate(a.cos + position * a.rotary, a.sin + position * a.rotary, a.rotary, q + i * C);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t head = b.slot[t] * G + g;
      float* keys = a.keys + head * b.length * C + position / WIDE * C * WIDE + position % WIDE;
      for (int64_t c = 0; c < C; ++c) keys[c * WIDE] = k[g * C + c];
      float* values = a.values + head * padded(C) * b.length + position * WIDE;
      for (int64_t c = 0; c < C; c += WIDE)
        std::copy_n(v + g * C + c, std::min<int64_t>(WIDE, C - c), values + c * b.length);
    }
  }
}

// Attention of rows [first, last), which are of one sequence, for the queries of one key-value head.
inline void attend(const Attention& a, const Batch& b, const float* qkv, int64_t first,
                   int64_t last, int64_t g, float* out) {
  thread_local std::vector<float> weights, sums;
  thread_local std::vector<const float*> rows;
  const int64_t C = a.head_dim, per = a.heads / a.kv_heads, n = (last - first) * per;
  int64_t begin = 0, end = 0;
  for (int64_t t = first; t < last; ++t) {
    end = std::max(end, b.position[t] + 1);
    const int64_t seen = a.window ? std::max<int64_t>(0, b.position[t] + 1 - a.window) : 0;
    begin = t == first ? seen : std::min(begin, seen);
  }
  begin = begin / WIDE * WIDE;
  const int64_t seen = padded(end - begin), head = b.slot[first] * a.kv_heads + g;
  if (static_cast<int64_t>(weights.size()) < n * seen) weights.resize(n * seen);
  sums.resize(n);
  rows.resize(n);
  auto row = [&](int64_t i) { return first + i / per; };
  auto column = [&](int64_t i) { return (g * per + i % per) * C; };
  for (int64_t i = 0; i < n; ++i) rows[i] = qkv + row(i) * a.qkv.outputs + column(i);
  const float* keys = a.keys + head * b.length * C + begin * C;
  for (int64_t at = 0; at < seen; at += WIDE) {
    const char* panel = reinterpret_cast<const char*>(keys + at * C);
    const char* next = panel + C * Float32::bytes;
    in_passes<Float32>(n, panel, next, C, [&](int64_t from, int count, Fetch fetch) {
      with_rows(count, [&](auto number) {
        constexpr int M = decltype(number)::value;
        V lo[M], hi[M];
        multiply<Float32, M>(&rows[from], panel, C, fetch, lo, hi);
        for (int m = 0; m < M; ++m) {
          store(&weights[(from + m) * seen + at], lo[m]);
          store(&weights[(from + m) * seen + at + LANES], hi[m]);
        }
      });
    });
  }
  const float scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
  for (int64_t i = 0; i < n; ++i) {
    float* w = &weights[i * seen];
    const int64_t position = b.position[row(i)];
    const int64_t from = a.window ? std::max<int64_t>(begin, position + 1 - a.window) : begin;
    // What lies outside is masked: the cache holds anything there.
    std::fill(w, w + (from - begin), -std::numeric_limits<float>::infinity());
    std::fill(w + (position + 1 - begin), w + seen, -std::numeric_limits<float>::infinity());
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t j = from - begin; j <= position - begin; ++j) {
      w[j] *= scale;
      if (cap != 0.0f) w[j] = cap * std::tanh(w[j] / cap);
      largest = std::max(largest, w[j]);
    }
    V total{};
    for (int64_t j = 0; j < seen; j += LANES) {
      const V x = load(w + j) - largest;
      const V e = x < -87.0f ? V{} : exponential(x);
      total += e;
      store(w + j, e);
    }
    sums[i] = sum(total);
    rows[i] = w;
  }
  const float* values = a.values + head * padded(C) * b.length + begin * WIDE;
  for (int64_t c = 0; c < C; c += WIDE) {
    const char* panel = reinterpret_cast<const char*>(values + c * b.length);
    const char* next = panel + b.length * Float32::bytes;
    in_passes<Float32>(n, panel, next, end - begin, [&](int64_t from, int count, Fetch fetch) {
      with_rows(count, [&](auto number) {
        constexpr int M = decltype(number)::value;
        V lo[M], hi[M];
        multiply<Float32, M>(&rows[from], panel, end - begin, fetch, lo, hi);
        for (int m = 0; m < M; ++m) {
          float both[WIDE];
          store(both, lo[m] / sums[from + m]);
          store(both + LANES, hi[m] / sums[from + m]);
          std::copy_n(both, std::min<int64_t>(WIDE, C - c),
                      out + row(from + m) * a.out.inputs + column(from + m) + c);
        }
      });
    });
  }
}

// h += attention(norm(h)); x = what the feed-forward network reads. Called by a whole team.
inline void attention_half(const Layer& layer, const Batch& b, Workspace& work, float* h, float* x) {
  const Attention& a = layer.attention;
  float *qkv = work.qkv.data(), *heads = work.heads.data(), *output = work.output.data();
  uint32_t* rounded = work.rounded.data();
  norm_rows(b, layer.attention_norm, layer.eps, h, x);
  linear(a.qkv, x, b.stride, b.tokens, rounded, qkv, a.qkv.outputs, false);
  remember(a, b, layer.eps, qkv);
  const int64_t runs = work.runs.size() - 1;
#pragma omp for schedule(dynamic, 1)
  for (int64_t unit = 0; unit < runs * a.kv_heads; ++unit) {
    const int64_t run = unit / a.kv_heads;
    attend(a, b, qkv, work.runs[run], work.runs[run + 1], unit % a.kv_heads, heads);
  }
  if (layer.attention_post) {
    linear(a.out, heads, a.out.inputs, b.tokens, rounded, output, b.stride, false);
    add_normed(b, layer.attention_post, layer.eps, output, h);
  } else {
    linear(a.out, heads, a.out.inputs, b.tokens, rounded, h, b.stride, true);
  }
  norm_rows(b, layer.ffn_norm, layer.eps, h, x);
}

// h += ffn(x), for the slots in `work`. Called by a whole team.
inline void ffn_half(const Layer& layer, const Batch& b, Workspace& work, const float* x, float* h) {
  float* out = layer.ffn_post ? work.output.data() : h;
  apply_ffn(layer.ffn, x, b.stride, b.tokens, b.dim, work, out, b.stride, !layer.ffn_post);
  if (layer.ffn_post) add_normed(b, layer.ffn_post, layer.eps, out, h);
}

// Makes room for a layer, and cuts the rows into runs of one sequence that share its keys and
// values: as many rows as fill a pass.
inline void prepare(const Layer& layer, const Batch& b, Workspace& work) {
  const int64_t most =
      std::max<int64_t>(1, ROWS / (layer.attention.heads / layer.attention.kv_heads));
  work.runs.clear();
  for (int64_t t = 0; t < b.tokens; ++t)
    if (!t || b.slot[t] != b.slot[t - 1] || t - work.runs.back() == most) work.runs.push_back(t);
  work.runs.push_back(b.tokens);
  Workspace::at_least(work.qkv, b.tokens * layer.attention.qkv.outputs);
  Workspace::at_least(work.heads, b.tokens * layer.attention.out.inputs);
  Workspace::at_least(work.output, b.tokens * b.stride);
  for (const Linear& w : {layer.attention.qkv, layer.attention.out})
    Workspace::at_least(work.rounded, scratch_words(w.format, b.tokens, w.inputs));
  prepare(layer.ffn, b.tokens, work);
}

// One layer whose router is native, or that has none.
inline void whole_layer(const Layer& layer, const Batch& b, Workspace& work, float* h, float* x) {
  attention_half(layer, b, work, h, x);
  route(layer.ffn, b.threshold, x, b.stride, b.tokens, work);
  ffn_half(layer, b, work, x, h);
}

}  // namespace
