// Activation functions on a register of floats, accurate to a few units in the last place of
// float32, except erf (absolute error 1.5e-7, Abramowitz and Stegun 7.1.26).

#pragma once

#include "panels.h"

namespace {

inline V exponential(V x) {
  // exp(x) = 2^n exp(r), |r| <= ln(2) / 2; the range is where neither factor overflows.
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const V magic = splat(12582912.0f);  // adding it rounds to an integer
  const V n = (x * 1.44269504f + magic) - magic;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * bits<V>((__builtin_convertvector(n, VI) + 127) << 23);
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }
inline V tanh(V x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

inline V erf(V x) {
  const V size = x < 0.0f ? -x : x;
  const V t = 1.0f / (1.0f + 0.3275911f * size);
  V p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const V y = 1.0f - p * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

// The order is that of `_ACTIVATIONS` in packed.py.
enum Activation { SILU, GELU, GELU_TANH, RELU, RELU2, QUICK_GELU };

inline V activate(int activation, V x) {
  switch (activation) {
    case SILU: return x * sigmoid(x);
    case GELU: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU: return x < 0.0f ? V{} : x;
    case RELU2: return x < 0.0f ? V{} : x * x;
    default: return x * sigmoid(1.702f * x);
  }
}

}  // namespace
