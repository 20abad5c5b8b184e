// Blocks of keys and values in few bits, as chai_jax/model/few_bits.py and quantized.py pack them: for decode_blocks.cc.
//
// Numbers are unpacked in registers: a half byte is an index into a table of sixteen numbers. A key's scale multiplies
// the query, a value's the weight, so that no number is multiplied twice. What a loop goes along is no part of a vector:
// channels of keys, columns of values, so that nothing is summed across a vector (but for int4's keys, which lie
// otherwise).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int kTogether = 3;  // queries that are computed at once: their sums stay in registers
constexpr int kAhead = 2048;  // bytes

// Room for what is made of a block.
struct Scratch {
  std::vector<float> floats;
  std::vector<uint8_t> bytes;

  void Reserve(size_t some_floats, size_t some_bytes) {
    if (floats.size() < some_floats) floats.resize(some_floats);
    if (bytes.size() < some_bytes + kLanes) bytes.resize(some_bytes + kLanes);
  }
};

// How keys and values of a block are read, for one to `kTogether` queries at once. One class for all formats, so that
// what they have in common is compiled once.
class Keys {
 public:
  virtual ~Keys() = default;
  // scores[q][s] = <query[q], the key in column s of block `at`>, rows `stride` apart.
  virtual void Score(int64_t queries, const float* query, int64_t at, float* scores, int64_t stride,
                     Scratch& scratch) const = 0;
};
class Values {
 public:
  virtual ~Values() = default;
  // sums[q][r] += sum over the columns s of block `at` of weights[q][s] * values[s][r].
  virtual void Mix(int64_t queries, const float* weights, int64_t stride, int64_t at, float* sums,
                   Scratch& scratch) const = 0;
};

// `run` with the number of queries as a constant.
template <typename Run>
void Constant(int64_t queries, const Run& run) {
  if (queries == 1) run(std::integral_constant<int, 1>());
  else if (queries == 2) run(std::integral_constant<int, 2>());
  else run(std::integral_constant<int, 3>());
  static_assert(kTogether == 3);
}

inline Table Repeated(const float* levels, int count) {
  Table table;
  for (int entry = 0; entry < 16; ++entry) table.entries[entry] = levels[entry % count];
  return table;
}
inline Table Counting(int count) {
  Table table;
  for (int entry = 0; entry < 16; ++entry) table.entries[entry] = static_cast<float>(entry % count);
  return table;
}

inline void Prefetch(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + kAhead + at);
}

// The four quarters of a block's columns, each `size` bytes of half bytes: where they are, and how far up.
template <int kBits>
struct Quarters {
  const uint8_t* from[4];
  static constexpr int Shift(int quarter) { return kBits == 2 ? 2 * (quarter % 2) : 0; }

  // `fourth`: room for a quarter; of three bits the last one is taken from above the others.
  Quarters(const uint8_t* planes, int64_t size, uint8_t* fourth) {
    for (int quarter = 0; quarter < 4; ++quarter) from[quarter] = planes + (kBits == 2 ? quarter / 2 : quarter) * size;
    if (kBits != 3) return;
    const uint8_t *one = planes, *two = planes + size, *three = planes + 2 * size;
    for (int64_t at = 0; at < size; ++at)
      fourth[at] = static_cast<uint8_t>((one[at] >> 3 & 0x11) | (two[at] >> 2 & 0x22) | (three[at] >> 1 & 0x44));
    from[3] = fourth;
  }
};

// Keys with a scale for each channel, in blocks of 64: planes [heads, N, bits, R, 8].
template <int kBits>
class FewKeys : public Keys {
 public:
  static constexpr int64_t kBlock = 64, kBytes = kBlock / 8;  // of a channel in a plane
  static constexpr int kWide = kLanes > kBytes ? kLanes : kBytes, kParts = kWide / kLanes;  // bytes at once

  // scale and low [heads, N, R]; scales: what a scale's byte stands for.
  FewKeys(const uint8_t* planes, const uint8_t* scale, const BFloat16* low, const float* scales, int64_t rank)
      : planes(planes), scale(scale), low(low), scales(scales), rank(rank), table(Counting(1 << kBits)) {}

  void Score(int64_t queries, const float* query, int64_t at, float* scores, int64_t stride,
             Scratch& scratch) const override {
    scratch.Reserve(kTogether * kBytes * (rank + 1), kBytes * rank);
    Constant(queries, [&](auto count) { Score<count>(query, at, scores, stride, scratch); });
  }

 private:
  const uint8_t *planes, *scale;
  const BFloat16* low;
  const float* scales;
  int64_t rank;
  Table table;

  template <int kQueries>
  void Score(const float* query, int64_t at, float* scores, int64_t stride, Scratch& scratch) const {
    const int64_t size = kBytes * rank;
    const uint8_t* block = planes + at * kBits * size;
    Prefetch(block, kBits * size);
    const Quarters<kBits> quarters(block, size, scratch.bytes.data());
    float* asked = scratch.floats.data();
    float lowest[kQueries];
    for (int64_t channel = 0; channel < rank; ++channel) {
      const float step = scales[scale[at * rank + channel]];
      for (int row = 0; row < kQueries; ++row)
        std::fill_n(asked + row * (size + kBytes) + channel * kBytes, kBytes, query[row * rank + channel] * step);
    }
    for (int row = 0; row < kQueries; ++row) {
      lowest[row] = Product(query + row * rank, low + at * rank, rank);
      std::fill_n(asked + row * (size + kBytes) + size, kBytes, 0.0f);
    }

    Vec sums[kQueries][4][2][kParts] = {};
    auto add = [&](int64_t from, auto load) {
      for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {
          const int64_t place = from + part * kLanes;
          const Words word = load(quarters.from[quarter] + place) >> Quarters<kBits>::Shift(quarter);
          const Vec lower = Lookup(table, word), upper = Lookup(table, word >> 4);
#pragma GCC unroll 3
          for (int row = 0; row < kQueries; ++row) {
            const Vec entry = Load(asked + row * (size + kBytes) + place);
            sums[row][quarter][0][part] += entry * lower;
            sums[row][quarter][1][part] += entry * upper;
          }
        }
    };
    int64_t from = 0;
    for (; from + kWide <= size; from += kWide) add(from, [](const uint8_t* place) { return LoadBytes(place); });
    if (from < size) add(from, [&](const uint8_t* place) { return LoadBytes(place, size - from); });  // one channel
    for (int row = 0; row < kQueries; ++row)
      for (int half = 0; half < 8; ++half) {
        alignas(64) float parts[kWide];
        for (int part = 0; part < kParts; ++part) Store(parts + part * kLanes, sums[row][half / 2][half % 2][part]);
        float* found = scores + row * stride + half * kBytes;
        for (int64_t column = 0; column < kBytes; ++column) {
          found[column] = lowest[row] + parts[column];
          if (kWide > kBytes) found[column] += parts[column + kWide - kBytes];
        }
      }
  }
};

// Values with a scale for each column, in blocks of 64: planes [heads, N, bits, 8, R rounded up to eights].
template <int kBits>
class FewValues : public Values {
 public:
  static constexpr int64_t kBlock = 64, kRows = kBlock / 8;

  // scale [heads, N, 64]; levels: what numbers stand for.
  FewValues(const uint8_t* planes, const BFloat16* scale, const float* levels, int64_t rank)
      : planes(planes), scale(scale), rank(rank), table(Repeated(levels, 1 << kBits)) {}

  void Mix(int64_t queries, const float* weights, int64_t stride, int64_t at, float* sums,
           Scratch& scratch) const override {
    scratch.Reserve(kTogether * kBlock, kRows * Wide());
    Constant(queries, [&](auto count) { Mix<count>(weights, stride, at, sums, scratch); });
  }

 private:
  const uint8_t* planes;
  const BFloat16* scale;
  int64_t rank;
  Table table;

  int64_t Wide() const { return (rank + 7) / 8 * 8; }

  template <int kQueries>
  void Mix(const float* weights, int64_t stride, int64_t at, float* sums, Scratch& scratch) const {
    const int64_t wide = Wide(), size = kRows * wide;
    const uint8_t* block = planes + at * kBits * size;
    Prefetch(block, kBits * size);
    const Quarters<kBits> quarters(block, size, scratch.bytes.data());
    float* scaled = scratch.floats.data();
    for (int row = 0; row < kQueries; ++row)
      for (int64_t column = 0; column < kBlock; ++column)
        scaled[row * kBlock + column] = weights[row * stride + column] * ToFloat(scale[at * kBlock + column]);
    int64_t first = 0;
    for (; first + 4 * kLanes <= rank; first += 4 * kLanes) Channels<kQueries, 4>(quarters, first, rank, scaled, sums);
    for (; first < rank; first += kLanes) Channels<kQueries, 1>(quarters, first, rank, scaled, sums);
  }

  // kVectors vectors of channels; one alone may be cut off.
  template <int kQueries, int kVectors>
  void Channels(const Quarters<kBits>& quarters, int64_t first, int64_t end, const float* scaled, float* sums) const {
    const int64_t wide = Wide(), room = wide - first;
    Vec mixed[kQueries][kVectors] = {};
    auto mix = [&](auto load) {
      for (int64_t line = 0; line < kRows; ++line)
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter)
#pragma GCC unroll 4
          for (int vector = 0; vector < kVectors; ++vector) {
            const uint8_t* place = quarters.from[quarter] + line * wide + first + vector * kLanes;
            const Words word = load(place) >> Quarters<kBits>::Shift(quarter);
            const Vec lower = Lookup(table, word), upper = Lookup(table, word >> 4);
#pragma GCC unroll 3
            for (int row = 0; row < kQueries; ++row) {
              const float* weight = scaled + row * kBlock + 2 * kRows * quarter + line;
              mixed[row][vector] += weight[0] * lower;
              mixed[row][vector] += weight[kRows] * upper;
            }
          }
    };
    if (kVectors > 1 || room >= kLanes) mix([](const uint8_t* place) { return LoadBytes(place); });
    else if constexpr (kVectors == 1) mix([&](const uint8_t* place) { return LoadBytes(place, room); });
    for (int row = 0; row < kQueries; ++row)
      for (int vector = 0; vector < kVectors; ++vector) {
        float found[kLanes], *into = sums + row * end + first + vector * kLanes;
        Store(found, mixed[row][vector]);
        const int64_t count = std::min<int64_t>(kLanes, end - first - vector * kLanes);
        for (int64_t lane = 0; lane < count; ++lane) into[lane] += found[lane];
      }
  }
};

}  // namespace
