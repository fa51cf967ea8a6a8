// A feed-forward network as a decoder layer has it: routed experts, and what is always on.
//
// Shapes: T tokens, D model width, E experts.

#pragma once

#include "routing.h"

namespace {

// The struct is mirrored, field by field, in structs.py.
struct Ffn {
  const float* output_bias;  // [D] or null
  Router router;
  Experts experts;  // none: experts = 0
  Experts shared;
  Linear bypass_down;  // none: panels = null
  Linear bypass_up;
};

struct FfnWork {
  std::vector<float> scores, neurons, low, input, output;
  std::vector<uint32_t> rounded;
  Slots slots, all;

  template <class X>
  static X* at_least(std::vector<X>& buffer, int64_t size) {
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
  }
};

// Makes room for T tokens.
inline void prepare(const Ffn& f, int64_t T, FfnWork& work) {
  for (const Linear& w : {f.router.scores, f.bypass_down, f.bypass_up})
    FfnWork::at_least(work.rounded, scratch_words(w.format, T, w.inputs));
  for (const Experts& e : {f.experts, f.shared})
    FfnWork::at_least(work.rounded, scratch_words(e.format, T, e.inputs));
  FfnWork::at_least(work.low, T * f.bypass_down.outputs);
  if (f.router.scores.panels) FfnWork::at_least(work.scores, T * f.router.scores.outputs);
}

// Makes room for the neurons, whose slots are known.
inline void prepare_slots(const Ffn& f, int64_t T, FfnWork& work) {
  const int64_t routed = f.experts.experts ? work.slots.count() * f.experts.width : 0;
  const int64_t shared = f.shared.experts ? T * f.shared.width : 0;
  FfnWork::at_least(work.neurons, std::max(routed, shared));
}

// Finds the slots of T tokens. `thresholds` is null or [T]: the token's own, or NaN for the
// router's. Called by a whole team.
inline void route(const Ffn& f, const double* thresholds, const float* x, int64_t stride, int64_t T,
                  FfnWork& work) {
  const Router& r = f.router;
  const int64_t E = f.experts.experts, row = r.scores.outputs;
  auto decide_row = [&](int64_t t) {
    thread_local Decision decision;
    const bool own = thresholds && !std::isnan(thresholds[t]);
    decide(r, own ? thresholds[t] : r.threshold, E, decision, work.scores.data() + t * row);
  };
  if (r.scores.panels) {
    linear(r.scores, x, stride, T, work.rounded.data(), work.scores.data(), row, false);
    if (T > ROWS) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < T; ++t) decide_row(t);
    }
  }
#pragma omp single
  {
    if (r.scores.panels) {
      // Few are decided sooner than threads meet.
      for (int64_t t = 0; T <= ROWS && t < T; ++t) decide_row(t);
      work.slots.gather(work.scores.data(), row, T, E);
    } else {
      work.slots.all(T);
    }
    prepare_slots(f, T, work);
  }
}

// out = ffn(x), or added to out, for the slots in `work`. Called by a whole team.
inline void apply_ffn(const Ffn& f, const float* x, int64_t stride, int64_t T, int64_t D,
                      FfnWork& work, float* out, int64_t out_stride, bool add) {
  uint32_t* rounded = work.rounded.data();
  float* neurons = work.neurons.data();
  // What one part rounded, the next ones read.
  bool ready = false;
  if (f.experts.experts) {
    apply_experts(f.experts, work.slots, x, stride, T, rounded, neurons, out, out_stride, add);
    add = true;
    ready = f.experts.format == BFLOAT16_DOT;
  }
  if (f.shared.experts) {
    apply_experts(f.shared, work.all, x, stride, T, rounded, neurons, out, out_stride, add, ready);
    add = true;
    ready |= f.shared.format == BFLOAT16_DOT;
  }
  if (f.bypass_down.panels) {
    const int64_t rank = f.bypass_down.outputs;
    linear(f.bypass_down, x, stride, T, rounded, work.low.data(), rank, false, ready);
    linear(f.bypass_up, work.low.data(), rank, T, rounded, out, out_stride, add);
    add = true;
  }
  if (f.output_bias) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < D; ++i)
        out[t * out_stride + i] = (add ? out[t * out_stride + i] : 0.0f) + f.output_bias[i];
  }
}

}  // namespace
