// What Python calls; see library.py for the other side. Functions return 0, or 1 when memory ran
// out. Pointers are to contiguous arrays of the sizes that the comments give.

#include <new>

#include "experts.h"

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

}  // namespace

extern "C" {

int moesaic_lanes() { return LANES; }

// x [T, inputs], ids and weights [T, K], out [T, outputs].
int moesaic_experts(const Experts* e, const float* x, const int64_t* ids, const float* weights,
                    int64_t T, int64_t K, float* out) {
  return guarded([&] {
    Slots slots;
    std::vector<float> neurons;
    for (int64_t first = 0; first < T; first += MAX_TOKENS) {
      const int64_t tokens = std::min(MAX_TOKENS, T - first);
      slots.sort(ids + first * K, weights + first * K, tokens, K, e->experts);
      if (neurons.size() < static_cast<size_t>(slots.count() * e->width))
        neurons.resize(slots.count() * e->width);
      float* scratch = neurons.data();
#pragma omp parallel
      apply_experts(*e, slots, x + first * e->inputs, e->inputs, tokens, scratch,
                    out + first * e->outputs, e->outputs, false);
    }
  });
}

// x [T, inputs], out [T, outputs].
int moesaic_linear(const Linear* w, const float* x, int64_t T, float* out) {
#pragma omp parallel
  linear(*w, x, w->inputs, T, out, w->outputs, false);
  return 0;
}
}
