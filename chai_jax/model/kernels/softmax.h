// The softmax of a row of scores: for decode_cpu.cc and decode_blocks.cc.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

// e^x of x <= 0 (Cephes' expf, Moshier 1989: its relative error is below 2^-22), and 0 where that is no normal number.
inline float Exp(float x) {
  float clipped = std::max(x, -87.0f);
  float power = std::floor(clipped * 1.44269504f + 0.5f);
  float rest = clipped - power * 0.693359375f + power * 2.12194440e-4f;
  float found = 1.9875691500e-4f;
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    found = found * rest + next;
  found = found * rest * rest + rest + 1.0f;
  int32_t bits = (static_cast<int32_t>(power) + 127) << 23;
  float two_to_power;
  std::memcpy(&two_to_power, &bits, sizeof bits);
  return x < -87.0f ? 0.0f : found * two_to_power;
}

// The weights' sum; they are relative to the highest score.
inline float SoftmaxWeights(float* scores, const bool* allowed, int64_t columns) {
  constexpr float masked = std::numeric_limits<float>::lowest();  // as in columns.py
  float highest = masked, total = 0;
#ifndef __clang__  // which takes no maximum of float32 by vectors where there may be NaN, and warns of it
#pragma omp simd reduction(max : highest)
#endif
  for (int64_t column = 0; column < columns; ++column) {
    scores[column] = allowed[column] ? scores[column] : masked;
    highest = scores[column] > highest ? scores[column] : highest;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t column = 0; column < columns; ++column) {
    scores[column] = Exp(scores[column] - highest);
    total += scores[column];
  }
  return total;
}

}  // namespace
