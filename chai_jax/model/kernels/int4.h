// Blocks of keys and values in int4 (`Int4Array` of chai_jax/model/quantized.py): for decode_blocks.cc.
#pragma once
#include <algorithm>
#include <cstdint>

#include "few_bits.h"

namespace {

// Keys in blocks of 32, a scale and a lowest value for each channel: packed [heads, N, 16, R], two columns a byte.
class Int4Keys : public Keys {
 public:
  static constexpr int64_t kBlock = 32, kRows = kBlock / 2;

  // scale and low [heads, N, 1, R].
  Int4Keys(const uint8_t* packed, const BFloat16* scale, const BFloat16* low, int64_t rank)
      : packed(packed), scale(scale), low(low), rank(rank), table(Counting(16)) {}

  void Score(int64_t queries, const float* query, int64_t at, float* scores, int64_t stride,
             Scratch& scratch) const override {
    scratch.Reserve(kTogether * Wide(), 0);
    Constant(queries, [&](auto count) { Score<count>(query, at, scores, stride, scratch); });
  }

 private:
  const uint8_t* packed;
  const BFloat16 *scale, *low;
  int64_t rank;
  Table table;

  int64_t Wide() const { return (rank + kLanes - 1) / kLanes * kLanes; }

  template <int kQueries>
  void Score(const float* query, int64_t at, float* scores, int64_t stride, Scratch& scratch) const {
    const uint8_t* block = packed + at * kRows * rank;
    Prefetch(block, kRows * rank);
    const int64_t wide = Wide(), whole = rank / kLanes * kLanes;
    float* asked = scratch.floats.data();
    float lowest[kQueries];
    for (int row = 0; row < kQueries; ++row) {
      const float* mine = query + row * rank;
      lowest[row] = Product(mine, low + at * rank, rank);
      for (int64_t channel = 0; channel < rank; ++channel)
        asked[row * wide + channel] = mine[channel] * ToFloat(scale[at * rank + channel]);
      std::fill(asked + row * wide + rank, asked + (row + 1) * wide, 0.0f);
    }
    for (int64_t first = 0; first < kBlock; first += kLanes) {
      Vec sums[kQueries][kLanes];
      for (int64_t pair = 0; pair < kLanes / 2; ++pair) {
        const uint8_t* line = block + (first / 2 + pair) * rank;
        Vec mine[kQueries][2] = {};
        auto add = [&](int64_t channel, Words word) {
          const Vec lower = Lookup(table, word), upper = Lookup(table, word >> 4);
#pragma GCC unroll 3
          for (int row = 0; row < kQueries; ++row) {
            const Vec entry = Load(asked + row * wide + channel);
            mine[row][0] += entry * lower;
            mine[row][1] += entry * upper;
          }
        };
        for (int64_t channel = 0; channel < whole; channel += kLanes) add(channel, LoadBytes(line + channel));
        if (whole < rank) add(whole, LoadBytes(line + whole, rank - whole));
        for (int row = 0; row < kQueries; ++row)
          for (int64_t half = 0; half < 2; ++half) sums[row][2 * pair + half] = mine[row][half];
      }
      for (int row = 0; row < kQueries; ++row) Store(scores + row * stride + first, SumEach(sums[row]) + lowest[row]);
    }
  }
};

// Values in blocks of 32: packed [heads, N, 32, R / 2 rounded up], two channels a byte; of each column a scale and a
// lowest value for each 32 channels, which are 16 bytes.
class Int4Values : public Values {
 public:
  static constexpr int64_t kBlock = 32, kGroup = 32, kBytes = kGroup / 2;
  static constexpr int kParts = kBytes / kLanes;

  // scale and low [heads, N, 32, groups].
  Int4Values(const uint8_t* packed, const BFloat16* scale, const BFloat16* low, int64_t rank)
      : packed(packed), scale(scale), low(low), rank(rank), table(Counting(16)) {}

  void Mix(int64_t queries, const float* weights, int64_t stride, int64_t at, float* sums,
           Scratch&) const override {
    Constant(queries, [&](auto count) { Mix<count>(weights, stride, at, sums); });
  }

 private:
  const uint8_t* packed;
  const BFloat16 *scale, *low;
  int64_t rank;
  Table table;

  int64_t Bytes() const { return (rank + 1) / 2; }
  int64_t Groups() const { return (rank + kGroup - 1) / kGroup; }

  template <int kQueries>
  void Mix(const float* weights, int64_t stride, int64_t at, float* sums) const {
    Prefetch(packed + at * kBlock * Bytes(), kBlock * Bytes());
    for (int64_t group = 0; group < Groups(); ++group) {
      const int64_t room = Bytes() - group * kBytes;
      if (room >= kBytes) Group<kQueries>(weights, stride, at, group, sums, [](const uint8_t* place, int64_t) {
        return LoadBytes(place);
      });
      else Group<kQueries>(weights, stride, at, group, sums, [&](const uint8_t* place, int64_t from) {
        return LoadBytes(place, std::clamp<int64_t>(room - from, 0, kLanes));
      });
    }
  }

  template <int kQueries, typename LoadSome>
  void Group(const float* weights, int64_t stride, int64_t at, int64_t group, float* sums, LoadSome load) const {
    const int64_t groups = Groups(), first = group * kGroup, end = std::min(rank, first + kGroup);
    const uint8_t* from = packed + at * kBlock * Bytes() + group * kBytes;
    float steps[kBlock], least[kBlock], scaled[kQueries][kBlock], lowest[kQueries];
    auto spread = [&](int64_t apart) {
      const int64_t place = at * kBlock * groups + group;
      for (int64_t column = 0; column < kBlock; ++column) steps[column] = ToFloat(scale[place + column * apart]);
      for (int64_t column = 0; column < kBlock; ++column) least[column] = ToFloat(low[place + column * apart]);
    };
    if (groups == 2) spread(2);  // known when this is compiled, which makes vectors of it
    else spread(groups);
    for (int row = 0; row < kQueries; ++row) {
      const float* mine = weights + row * stride;
      lowest[row] = Product(mine, least, kBlock);
      for (int64_t column = 0; column < kBlock; ++column) scaled[row][column] = mine[column] * steps[column];
    }
    Vec mixed[kQueries][2][kParts] = {};  // even channels and odd ones
    for (int64_t column = 0; column < kBlock; ++column)
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Words word = load(from + column * Bytes() + part * kLanes, part * kLanes);
        const Vec even = Lookup(table, word), odd = Lookup(table, word >> 4);
#pragma GCC unroll 3
        for (int row = 0; row < kQueries; ++row) {
          mixed[row][0][part] += scaled[row][column] * even;
          mixed[row][1][part] += scaled[row][column] * odd;
        }
      }
    for (int row = 0; row < kQueries; ++row) {
      float found[2][kBytes];
      for (int part = 0; part < kParts; ++part)
        for (int half = 0; half < 2; ++half) Store(found[half] + part * kLanes, mixed[row][half][part]);
      for (int64_t channel = first; channel < end; ++channel)
        sums[row * rank + channel] += lowest[row] + found[channel % 2][(channel - first) / 2];
    }
  }
};

}  // namespace
