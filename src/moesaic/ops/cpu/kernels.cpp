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

// x [T, inputs], ids and weights [T, K], out [T, outputs].
int moesaic_experts(const Experts* e, const float* x, const int64_t* ids, const float* weights,
                    int64_t T, int64_t K, float* out) {
  return guarded([&] {
    Slots slots;
    std::vector<float> neurons;
    std::vector<uint32_t> words;
    for (int64_t first = 0; first < T; first += MAX_TOKENS) {
      const int64_t tokens = std::min(MAX_TOKENS, T - first);
      slots.sort(ids + first * K, weights + first * K, tokens, K, e->experts);
      Workspace::at_least(neurons, slots.count() * e->width);
      uint32_t* scratch = Workspace::at_least(words, scratch_words(e->format, tokens, e->inputs));
#pragma omp parallel
      apply_experts(*e, slots, x + first * e->inputs, e->inputs, tokens, scratch, neurons.data(),
                    out + first * e->outputs, e->outputs, false);
    }
  });
}

// As moesaic_experts, routed here: x [T, inputs], out [T, outputs].
int moesaic_layer(const Router* router, const Experts* e, const float* x, int64_t T, float* out) {
  return guarded([&] {
    Slots slots;
    std::vector<float> neurons, scores;
    std::vector<uint32_t> words;
    for (int64_t first = 0; first < T; first += MAX_TOKENS) {
      const int64_t tokens = std::min(MAX_TOKENS, T - first);
      const float* h = x + first * e->inputs;
      Workspace::at_least(scores, tokens * router->scores.outputs);
      Workspace::at_least(words, scratch_words(router->scores.format, tokens, e->inputs));
      Workspace::at_least(words, scratch_words(e->format, tokens, e->inputs));
#pragma omp parallel
      {
        linear(router->scores, h, e->inputs, tokens, words.data(), scores.data(),
               router->scores.outputs, false);
#pragma omp single
        {
          slots.decide(*router, nullptr, scores.data(), tokens, e->experts);
          Workspace::at_least(neurons, slots.count() * e->width);
        }
        apply_experts(*e, slots, h, e->inputs, tokens, words.data(), neurons.data(),
                      out + first * e->outputs, e->outputs, false);
      }
    }
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
    work.slots.sort(ids, weights, b->tokens, K, layer->experts.experts);
    Workspace::at_least(work.output, b->tokens * b->stride);
    prepare_ffn(*layer, *b, work);
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
