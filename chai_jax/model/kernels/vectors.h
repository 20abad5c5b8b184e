// Vectors of float32, as wide as this CPU's, and what is loaded into them: for decode_cpu.cc and products_cpu.cc.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <typename T>
using Lanes __attribute__((vector_size(kLanes * sizeof(T)))) = T;
template <int kCount>
using Floats __attribute__((vector_size(kCount * sizeof(float)))) = float;
using Vec = Floats<kLanes>;

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(int8_t x) { return x; }
inline float ToFloat(BFloat16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

inline Vec Load(const float* from) {
  Vec found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline Vec Load(const int8_t* from) {
  Lanes<int8_t> stored;
  std::memcpy(&stored, from, sizeof stored);
  // Twice as wide each time, as the instructions do: GCC 12 takes wider steps one by one.
  auto wide = __builtin_convertvector(stored, Lanes<int16_t>);
  return __builtin_convertvector(__builtin_convertvector(wide, Lanes<int32_t>), Vec);
}
inline Vec Load(const BFloat16* from) {
  Lanes<uint16_t> stored;
  std::memcpy(&stored, from, sizeof stored);
  Lanes<uint32_t> bits = __builtin_convertvector(stored, Lanes<uint32_t>) << 16;
  Vec found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}
inline void Store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// By halves, entry by entry: compilers make of it what is fastest, and leave a vector in its register that is nowhere
// read in parts by its address.
template <int... kLane>
inline float Sum(Floats<2 * sizeof...(kLane)> x, std::integer_sequence<int, kLane...>) {
  constexpr int count = sizeof...(kLane);
  Floats<count> halves = Floats<count>{x[kLane]...} + Floats<count>{x[kLane + count]...};
  if constexpr (count == 2) return halves[0] + halves[1];
  else return Sum(halves, std::make_integer_sequence<int, count / 2>{});
}
inline float Sum(Vec x) { return Sum(x, std::make_integer_sequence<int, kLanes / 2>{}); }

// Of rows of different types.
template <typename One, typename Two>
inline float Product(const One* one, const Two* two, int64_t count) {
  Vec sums = {};
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) sums += Load(one + at) * Load(two + at);
  float total = Sum(sums);
  for (; at < count; ++at) total += ToFloat(one[at]) * ToFloat(two[at]);
  return total;
}

// Bytes, each in a word of its own: those of a whole vector, or `count` of them and zeros.
using Words = Lanes<uint32_t>;
inline Words LoadBytes(const uint8_t* from) {
  // By name, since GCC 12 takes eight instructions of what is one. With a mask, since it warns of its header without.
#if defined(__AVX512F__)
  __m512i wide = _mm512_maskz_cvtepu8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Lanes<uint8_t> stored;
  std::memcpy(&stored, from, sizeof stored);
  Words wide = __builtin_convertvector(__builtin_convertvector(stored, Lanes<uint16_t>), Words);
#endif
  Words found;
  std::memcpy(&found, &wide, sizeof found);
  return found;
}
inline Words LoadBytes(const uint8_t* from, int64_t count) {
  uint8_t copy[kLanes] = {};
  std::memcpy(copy, from, count);
  return LoadBytes(copy);
}

// Sixteen numbers, and of each word that which its lowest four bits say. What lies above these does not matter.
struct Table {
  alignas(64) float entries[16];
};
inline Vec Lookup(const Table& table, Words at) {
#if defined(__AVX512F__)
  __m512i index;
  std::memcpy(&index, &at, sizeof index);
  __m512 from = _mm512_load_ps(table.entries);
  __m512 read = _mm512_mask_permutexvar_ps(from, 0xFFFF, index, from);  // a mask for the same reason
#elif defined(__AVX2__)
  __m256i index;
  std::memcpy(&index, &at, sizeof index);
  __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table.entries), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table.entries + 8), index);
  __m256 read = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#else
  Vec read;
  for (int lane = 0; lane < kLanes; ++lane) read[lane] = table.entries[at[lane] & 15];
#endif
  Vec found;
  std::memcpy(&found, &read, sizeof found);
  return found;
}

// The sums of as many vectors as a vector has lanes, in their order: two by two, groups of lanes to half their size.
template <int kGroup, int... kLane>
inline Vec Fold(Vec x, Vec y, std::integer_sequence<int, kLane...>) {
  constexpr int half = kGroup / 2;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, y, (kLane / half * kGroup + kLane % half)...) +
         __builtin_shufflevector(x, y, (kLane / half * kGroup + half + kLane % half)...);
#else
  auto at = [&](int lane) { return lane < kLanes ? x[lane] : y[lane - kLanes]; };
  return Vec{at(kLane / half * kGroup + kLane % half)...} + Vec{at(kLane / half * kGroup + half + kLane % half)...};
#endif
}
template <int kCount = kLanes>
inline Vec SumEach(const Vec* x) {
  if constexpr (kCount == 1) {
    return *x;
  } else {
    Vec first = SumEach<kCount / 2>(x), second = SumEach<kCount / 2>(x + kCount / 2);
    return Fold<2 * kLanes / kCount>(first, second, std::make_integer_sequence<int, kLanes>{});
  }
}

}  // namespace
