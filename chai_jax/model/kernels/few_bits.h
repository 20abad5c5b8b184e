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
#include <vector>

#include "vectors.h"

namespace {

constexpr int kTogether = 3;  // queries that are computed at once: their sums stay in registers
constexpr int kAhead = 2048;  // bytes

// At once, in bytes and floats, for as many queries as come together.
struct Scratch {
  std::vector<float> floats;
  std::vector<uint8_t> bytes;
};

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
struct FewKeys {
  static constexpr int64_t kBlock = 64, kBytes = kBlock / 8;  // of a channel in a plane
  static constexpr int kWide = kLanes > kBytes ? kLanes : kBytes, kParts = kWide / kLanes;  // bytes at once
  const uint8_t *planes, *scale;  // [heads, N, R]
  const BFloat16* low;  // likewise
  const float* scales;  // what a scale's byte stands for
  int64_t rank;
  Table table = Counting(1 << kBits);

  void Reserve(Scratch& scratch) const {
    scratch.floats.resize(kTogether * kBytes * (rank + 1));
    scratch.bytes.resize(kBytes * rank + kLanes);
  }

  // scores[q][0..63] = <query[q], the keys of block `at`>, rows `stride` apart.
  template <int kQueries>
  void Score(const float* query, int64_t at, float* scores, int64_t stride, Scratch& scratch) const {
    const int64_t size = kBytes * rank;
    const uint8_t* block = planes + at * kBits * size;
    Prefetch(block, kBits * size);
    const Quarters<kBits> quarters(block, size, scratch.bytes.data());
    float* asked = scratch.floats.data();
    float lowest[kQueries] = {};
    for (int64_t channel = 0; channel < rank; ++channel) {
      const float step = scales[scale[at * rank + channel]], least = ToFloat(low[at * rank + channel]);
      for (int row = 0; row < kQueries; ++row) {
        const float entry = query[row * rank + channel];
        lowest[row] += entry * least;
        std::fill_n(asked + row * (size + kBytes) + channel * kBytes, kBytes, entry * step);
      }
    }
    for (int row = 0; row < kQueries; ++row) std::fill_n(asked + row * (size + kBytes) + size, kBytes, 0.0f);

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
struct FewValues {
  static constexpr int64_t kBlock = 64, kRows = kBlock / 8;
  const uint8_t* planes;
  const BFloat16* scale;  // [heads, N, 64]
  int64_t rank;
  Table table;

  int64_t Wide() const { return (rank + 7) / 8 * 8; }
  void Reserve(Scratch& scratch) const {
    scratch.floats.resize(kTogether * (kBlock + Wide() + kLanes));
    scratch.bytes.resize(kRows * Wide() + kLanes);
  }

  // sums[q][r] += sum over the columns s of block `at` of weights[q][s] * values[s][r].
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

  // kVectors vectors of channels, of which the last may be cut off.
  template <int kQueries, int kVectors>
  void Channels(const Quarters<kBits>& quarters, int64_t first, int64_t end, const float* scaled, float* sums) const {
    const int64_t wide = Wide(), room = wide - first;
    const bool whole = room >= kVectors * kLanes;
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
    if (whole) mix([](const uint8_t* place) { return LoadBytes(place); });
    else mix([&](const uint8_t* place) { return LoadBytes(place, room); });
    for (int row = 0; row < kQueries; ++row)
      for (int vector = 0; vector < kVectors; ++vector)
        for (int64_t lane = 0, channel = first + vector * kLanes; lane < kLanes && channel < end; ++lane, ++channel)
          sums[row * end + channel] += mixed[row][vector][lane];
  }
};

}  // namespace
