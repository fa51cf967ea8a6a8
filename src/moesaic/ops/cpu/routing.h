// Linear scores and a rule of choice: the experts of each token, and what they weigh.
//
// Shapes: T tokens, E experts, S >= E scores: those beyond E stand for no expert.

#pragma once

#include <limits>
#include <utility>

#include "experts.h"

namespace {

// The orders are those of the tables in ffn.py.
enum Rule { ABOVE, HIGHEST, HIGHEST_OF_EACH, CUMULATED };
enum Gate { SIGMOID, SOFTMAX, ONE };
enum Normalize { NONE, SUM, COUNT };

// What the fields mean is said by `Choice` in choice.py. Mirrored in structs.py.
struct Router {
  Linear scores;             // panels null: every expert for every token
  const float* choice_bias;  // [S] or null
  const float* factor;       // [E] or null
  double threshold;
  double scale;
  int64_t num_scores;  // S
  int64_t rule;
  int64_t gate;
  int64_t normalize;
  int64_t by_gate;
  int64_t lowest_first;
  int64_t top_k;
  int64_t groups;
  int64_t top_groups;
};

// Room for the decision of one token.
struct Decision {
  std::vector<float> keys, best;
  std::vector<uint8_t> held, allowed;
  std::vector<std::pair<float, int64_t>> order;
};

// Marks the k highest of n keys. Which of equal ones is the algorithm's matter, so this is that of
// torch's top-k, unless the lowest is asked for. What is not a number counts as highest.
inline void mark_highest(const float* keys, int64_t n, int64_t k, bool lowest_first, Decision& d,
                         uint8_t* held) {
  d.order.resize(n);
  for (int64_t i = 0; i < n; ++i) d.order[i] = {keys[i], i};
  auto higher = [&](const std::pair<float, int64_t>& a, const std::pair<float, int64_t>& b) {
    if (lowest_first && a.first == b.first) return a.second < b.second;
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= n) std::partial_sort(d.order.begin(), d.order.begin() + k, d.order.end(), higher);
  else std::nth_element(d.order.begin(), d.order.begin() + k - 1, d.order.end(), higher);
  for (int64_t i = 0; i < k; ++i) held[d.order[i].second] = 1;
}

inline float gate_of(float score) { return 1.0f / (1.0f + std::exp(-score)); }

// The softmax over those of n scores that count is exp(score - most) / total.
struct Softmax {
  float most = -std::numeric_limits<float>::infinity(), total = 0.0f;

  template <class F>
  Softmax(const float* scores, int64_t n, F counts) {
    for (int64_t e = 0; e < n; ++e)
      if (counts(e)) most = std::max(most, scores[e]);
    for (int64_t e = 0; e < n; ++e)
      if (counts(e)) total += std::exp(scores[e] - most);
  }
};

// Bars the experts outside of the groups with the highest sums of their best two.
inline void keep_groups(const Router& r, Decision& d) {
  const int64_t size = r.num_scores / r.groups;
  d.best.resize(r.groups);
  d.allowed.assign(r.groups, 0);
  for (int64_t g = 0; g < r.groups; ++g) {
    float first = -std::numeric_limits<float>::infinity(), second = first;
    for (const float* key = &d.keys[g * size]; key < &d.keys[g * size] + size; ++key) {
      if (*key > first) second = first, first = *key;
      else second = std::max(second, *key);
    }
    d.best[g] = size > 1 ? first + second : first;
  }
  mark_highest(d.best.data(), r.groups, r.top_groups, false, d, d.allowed.data());
  for (int64_t i = 0; i < r.num_scores; ++i)
    if (!d.allowed[i / size]) d.keys[i] = -std::numeric_limits<float>::infinity();
}

// Marks experts, most probable first, while those before do not exceed the threshold.
inline void mark_cumulated(const Router& r, double threshold, const float* scores, Decision& d) {
  const int64_t S = r.num_scores;
  const Softmax softmax(scores, S, [](int64_t) { return true; });
  d.order.resize(S);
  for (int64_t i = 0; i < S; ++i)
    d.order[i] = {std::exp(scores[i] - softmax.most) / softmax.total, i};
  std::stable_sort(d.order.begin(), d.order.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  double before = 0.0;
  for (const auto& [probability, i] : d.order) {
    // A rounded sum may pass 1 early; the rule at 1 is every expert.
    if (threshold < 1.0 && static_cast<float>(before) > static_cast<float>(threshold)) break;
    d.held[i] = 1;
    before += probability;
  }
}

// Turns the scores [S] of a token into the weights of E experts, zero where it does without.
inline void decide(const Router& r, double threshold, int64_t E, Decision& d, float* scores) {
  const int64_t S = r.num_scores;
  d.held.assign(S, 0);
  if (r.rule == ABOVE) {
    // A gate exceeds the threshold where its logit exceeds the threshold's.
    const float limit = static_cast<float>(std::log(threshold / (1.0 - threshold)));
    for (int64_t e = 0; e < E; ++e) d.held[e] = scores[e] > limit;
  } else if (r.rule == CUMULATED) {
    mark_cumulated(r, threshold, scores, d);
  } else {
    d.keys.assign(scores, scores + S);
    if (r.by_gate)
      for (float& key : d.keys) key = gate_of(key);
    if (r.choice_bias)
      for (int64_t i = 0; i < S; ++i) d.keys[i] += r.choice_bias[i];
    if (r.rule == HIGHEST && r.top_groups < r.groups) keep_groups(r, d);
    const int64_t parts = r.rule == HIGHEST ? 1 : r.groups, size = S / parts;
    for (int64_t g = 0; g < parts; ++g)
      mark_highest(&d.keys[g * size], size, r.top_k, r.lowest_first, d, &d.held[g * size]);
  }
  float divisor = 1.0f, most = 0.0f;
  if (r.gate == SOFTMAX) {
    // Normalised, it is the softmax of the held alone, which cannot vanish beside the others.
    const bool alone = r.normalize == SUM;
    const Softmax softmax(scores, alone ? E : S,
                          [&](int64_t e) { return !alone || d.held[e]; });
    most = softmax.most, divisor = softmax.total;
  }
  float sum = 0.0f;
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    if (!d.held[e]) {
      scores[e] = 0.0f;
      continue;
    }
    if (r.gate == SIGMOID) scores[e] = gate_of(scores[e]);
    else scores[e] = r.gate == SOFTMAX ? std::exp(scores[e] - most) : 1.0f;
    sum += scores[e];
    ++count;
  }
  if (r.normalize == SUM && r.gate != SOFTMAX)
    divisor = std::max(sum, std::numeric_limits<float>::min());
  float scale = static_cast<float>(r.scale);
  if (r.normalize == COUNT && count) scale *= static_cast<float>(E) / count;
  for (int64_t e = 0; e < E; ++e)
    if (d.held[e]) scores[e] = scores[e] / divisor * scale * (r.factor ? r.factor[e] : 1.0f);
}

}  // namespace
