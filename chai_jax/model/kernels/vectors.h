// Vectors of float32, as wide as this CPU's, and what is loaded into them: for decode_cpu.cc and products_cpu.cc.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

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

}  // namespace
