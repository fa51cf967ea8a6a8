// What Python calls; see structs.py for the other side. Functions return 0, or 1 when memory ran
// out. Pointers are to contiguous arrays of the sizes that the comments give.

#include <new>

#include "decoder.h"

namespace {

// Tokens at a time in one layer: bounds the scratch of a long prompt.
constexpr int64_t MAX_TOKENS = 512;

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Kept for the next call of this thread.
Workspace& workspace() {
  thread_local Workspace work;
  return work;
}

// bfloat16 is the upper half of a float32.
inline float widened(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }

// To the nearest, ties to even; not a number stays so.
inline uint16_t narrowed(float x) {
  const uint32_t word = bits<uint32_t>(x);
  const uint32_t nearest = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : nearest);
}

// Rows x [T, inputs] of experts, a part at a time: `prepare(first, tokens)` by one thread, then
// `apply(h, tokens, y)` by all, from float32 rows of `inputs` to those of `outputs`; into
// out [T, inputs].
template <class P, class A>
void in_parts(const Experts& e, const void* x, bool bfloat16, int64_t T, Workspace& work, void* out,
              P prepare, A apply) {
  const int64_t D = e.inputs, padded_D = e.outputs;
  const bool direct = !bfloat16 && D == padded_D;
  for (int64_t first = 0; first < T; first += MAX_TOKENS) {
    const int64_t tokens = std::min(MAX_TOKENS, T - first);
    const float* h = static_cast<const float*>(x) + first * D;
    float* y = static_cast<float*>(out) + first * D;
    const uint16_t* half_x = static_cast<const uint16_t*>(x) + first * D;
    uint16_t* half_out = static_cast<uint16_t*>(out) + first * D;
    float* wide = Workspace::at_least(work.input, bfloat16 ? tokens * D : 0);
    if (bfloat16) h = wide;
    if (!direct) y = Workspace::at_least(work.output, tokens * padded_D);
    prepare(first, tokens);
#pragma omp parallel
    {
      if (bfloat16) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * D; ++i) wide[i] = widened(half_x[i]);
      }
      apply(h, tokens, y);
      if (!direct) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
          const float* row = y + t * padded_D;
          if (bfloat16)
            for (int64_t i = 0; i < D; ++i) half_out[t * D + i] = narrowed(row[i]);
          else
            std::copy_n(row, D, static_cast<float*>(out) + (first + t) * D);
        }
      }
    }
  }
}

}  // namespace

extern "C" {

int moesaic_lanes() { return LANES; }

// Whether bfloat16 can be multiplied with bfloat16.
int moesaic_has_dot() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// Threads of the calls that follow. Torch may bring an OpenMP of its own, with its own number.
void moesaic_threads(int count) { omp_set_num_threads(count); }

// x and out [T, inputs], float32 or bfloat16; ids and weights [T, K].
int moesaic_experts(const Experts* e, const void* x, int64_t bfloat16, const int64_t* ids,
                    const float* weights, int64_t T, int64_t K, void* out, int threads) {
  return guarded([&] {
    omp_set_num_threads(threads);
    Workspace& work = workspace();
    in_parts(*e, x, bfloat16, T, work, out, [&](int64_t first, int64_t tokens) {
      work.slots.sort(ids + first * K, weights + first * K, tokens, K, e->experts);
      Workspace::at_least(work.neurons, work.slots.count() * e->width);
      Workspace::at_least(work.rounded, scratch_words(e->format, tokens, e->inputs));
    }, [&](const float* h, int64_t tokens, float* y) {
      apply_experts(*e, work.slots, h, e->inputs, tokens, work.rounded.data(), work.neurons.data(),
                    y, e->outputs, false);
    });
  });
}

// A whole layer, routed here: x and out [T, inputs], float32 or bfloat16.
int moesaic_layer(const Ffn* f, const void* x, int64_t bfloat16, int64_t T, void* out,
                  int threads) {
  return guarded([&] {
    omp_set_num_threads(threads);
    Workspace& work = workspace();
    const Experts& e = f->experts.experts ? f->experts : f->shared;
    in_parts(e, x, bfloat16, T, work, out, [&](int64_t, int64_t tokens) {
      work.all.all(tokens);
      prepare(*f, tokens, work);
    }, [&](const float* h, int64_t tokens, float* y) {
      route(*f, nullptr, h, e.inputs, tokens, work);
      apply_ffn(*f, h, e.inputs, tokens, e.inputs, work, y, e.outputs, false);
    });
  });
}

// x [T, inputs], out [T, outputs].
int moesaic_linear(const Linear* w, const float* x, int64_t T, float* out) {
  return guarded([&] {
    std::vector<uint32_t> scratch(scratch_words(w->format, T, w->inputs));
#pragma omp parallel
    linear(*w, x, w->inputs, T, scratch.data(), out, w->outputs, false);
  });
}

// h [T, stride] in and out, x [T, stride] scratch. Every layer's router is native. `used` is null
// or [layers, T, E], zeros, where an expert that a token used becomes 1.
int moesaic_layers(const Layer* layers, int64_t count, const Batch* b, float* h, float* x,
                   uint8_t* used, int64_t E) {
  return guarded([&] {
    Workspace& work = workspace();
    work.all.all(b->tokens);
    // Layers differ in their networks and routers, not in their heads: one cut serves all.
    for (int64_t i = 0; i < count; ++i) prepare(layers[i], *b, work);
#pragma omp parallel
    for (int64_t i = 0; i < count; ++i) {
      whole_layer(layers[i], *b, work, h, x);
      if (used) {
#pragma omp single
        work.slots.mark(used + i * b->tokens * E, E);
      }
    }
  });
}

// One layer in two calls, for a router that is not native: it reads x between them.
int moesaic_attention(const Layer* layer, const Batch* b, float* h, float* x) {
  return guarded([&] {
    Workspace& work = workspace();
    prepare(*layer, *b, work);
#pragma omp parallel
    attention_half(*layer, *b, work, h, x);
  });
}

int moesaic_ffn(const Layer* layer, const Batch* b, float* h, const float* x, const int64_t* ids,
                const float* weights, int64_t K) {
  return guarded([&] {
    Workspace& work = workspace();
    work.all.all(b->tokens);
    work.slots.sort(ids, weights, b->tokens, K, layer->ffn.experts.experts);
    Workspace::at_least(work.output, b->tokens * b->stride);
    prepare(layer->ffn, b->tokens, work);
    prepare_slots(layer->ffn, b->tokens, work);
#pragma omp parallel
    ffn_half(*layer, *b, work, x, h);
  });
}

// out [rows, outputs] = head(norm(h)) of some rows of h.
int moesaic_head(const Linear* w, const float* norm, double eps, const float* h, int64_t stride,
                 const int64_t* rows, int64_t count, float* out) {
  return guarded([&] {
    std::vector<float> x(count * w->inputs);
    for (int64_t i = 0; i < count; ++i)
      rms_norm(h + rows[i] * stride, norm, eps, w->inputs, &x[i * w->inputs]);
    std::vector<uint32_t> scratch(scratch_words(w->format, count, w->inputs));
#pragma omp parallel
    linear(*w, x.data(), w->inputs, count, scratch.data(), out, w->outputs, false);
  });
}
}
