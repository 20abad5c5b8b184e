// What decoding does at every token, for CPUs: attention of one new token, and products of a few rows with a matrix.
//
// Both are bound by memory: each key, value and weight is read once, from several places of an array at a time, since
// one stream does not fill a core's queue of loads. Compiled and registered by cpu.py; called by decode_cpu.py and
// products_cpu.py, which see to shapes and types.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

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

// ---- Attention of one new token -------------------------------------------------------------------------------------

constexpr int kStreams = 4;  // columns read at once, from as many stretches of the cache
constexpr int kAhead = 2048;  // bytes

template <typename T>
inline void Prefetch(const T* row, int64_t rank) {
  auto* bytes = reinterpret_cast<const char*>(row) + kAhead;
  for (int64_t at = 0; at < static_cast<int64_t>(rank * sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// scores[s] = <query, keys[s]>; kRank is the rank where it is known when this is compiled, else 0.
template <int kRank, typename T>
void Scores(const float* query, const T* keys, int64_t columns, int64_t any_rank, float* scores) {
  const int64_t rank = kRank ? kRank : any_rank, whole = rank / kLanes * kLanes, stretch = columns / kStreams;
  auto score = [&](int64_t column) {
    const T* key = keys + column * rank;
    Prefetch(key, rank);
    Vec sums = {};
    for (int64_t at = 0; at < whole; at += kLanes) sums += Load(query + at) * Load(key + at);
    float total = Sum(sums);
    for (int64_t at = whole; at < rank; ++at) total += query[at] * ToFloat(key[at]);
    scores[column] = total;
  };
  for (int64_t column = 0; column < stretch; ++column)
    for (int stream = 0; stream < kStreams; ++stream) score(column + stream * stretch);
  for (int64_t column = kStreams * stretch; column < columns; ++column) score(column);
}

// sums[r] = sum over s of weights[s] * values[s][r].
template <int kRank, typename T>
void Mix(const float* weights, const T* values, int64_t columns, int64_t any_rank, float* sums) {
  const int64_t rank = kRank ? kRank : any_rank, whole = rank / kLanes * kLanes, stretch = columns / kStreams;
  std::fill(sums, sums + rank, 0.0f);
  for (int64_t column = 0; column < stretch; ++column) {
    const T* rows[kStreams];
    float weight[kStreams];
    for (int stream = 0; stream < kStreams; ++stream) {
      rows[stream] = values + (column + stream * stretch) * rank;
      weight[stream] = weights[column + stream * stretch];
      Prefetch(rows[stream], rank);
    }
    for (int64_t at = 0; at < whole; at += kLanes) {
      Vec sum = Load(sums + at);
      for (int stream = 0; stream < kStreams; ++stream) sum += weight[stream] * Load(rows[stream] + at);
      Store(sums + at, sum);
    }
    for (int64_t at = whole; at < rank; ++at)
      for (int stream = 0; stream < kStreams; ++stream) sums[at] += weight[stream] * ToFloat(rows[stream][at]);
  }
  for (int64_t column = kStreams * stretch; column < columns; ++column)
    for (int64_t at = 0; at < rank; ++at) sums[at] += weights[column] * ToFloat(values[column * rank + at]);
}

// The weights' sum; they are relative to the highest score.
float SoftmaxWeights(float* scores, const bool* allowed, int64_t columns) {
  constexpr float masked = std::numeric_limits<float>::lowest();  // as in columns.py
  float highest = masked, total = 0;
#pragma omp simd reduction(max : highest)
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

// One group's arrays: query [B, C, q, R], keys [B, C, S, R], values [B, C v, S, Rv], int8's scales [B, heads, S] or
// nullptr, allowed [B, S], out [B, C, q v, Rv].
template <typename T>
struct Group {
  const float* query;
  const T *keys, *values;
  const BFloat16 *key_scale, *value_scale;
  const bool* allowed;
  float* out;
  int64_t batch, clusters, queries, heads, columns, rank, value_rank;

  // Attention of one cluster of one sequence, over the columns that the sequence may read, and those between them.
  template <int kRank>
  void Attend(int64_t sequence, int64_t cluster) const {
    const bool* readable = allowed + sequence * columns;
    int64_t first = std::find(readable, readable + columns, true) - readable, end = columns;
    const bool none = first == columns;  // then it reads all alike
    if (none) first = 0;
    while (!none && !readable[end - 1]) --end;
    const int64_t count = end - first, at = sequence * clusters + cluster;
    std::vector<float> scores(count), weights(count);
    for (int64_t row = 0; row < queries; ++row) {
      Scores<kRank>(query + (at * queries + row) * rank, keys + (at * columns + first) * rank, count, rank,
                    scores.data());
      if (key_scale) Scale(scores, key_scale + at * columns + first, scores);
      float total = SoftmaxWeights(scores.data(), readable + first, count);
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t value = at * heads + head;
        if (value_scale) Scale(scores, value_scale + value * columns + first, weights);
        float* sums = out + ((at * queries + row) * heads + head) * value_rank;
        Mix<kRank>((value_scale ? weights : scores).data(), values + (value * columns + first) * value_rank, count,
                   value_rank, sums);
        for (int64_t entry = 0; entry < value_rank; ++entry) sums[entry] /= total;
      }
    }
  }

  static void Scale(const std::vector<float>& from, const BFloat16* scale, std::vector<float>& to) {
    for (size_t column = 0; column < from.size(); ++column) to[column] = from[column] * ToFloat(scale[column]);
  }
};

template <typename T>
void AttendAll(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
               const BFloat16* key_scale, const BFloat16* value_scale, ffi::Buffer<ffi::PRED> allowed, float* out) {
  auto asked = query.dimensions(), key = keys.dimensions(), value = values.dimensions();
  Group<T> group{query.typed_data(),
                 static_cast<const T*>(keys.untyped_data()),
                 static_cast<const T*>(values.untyped_data()),
                 key_scale, value_scale, allowed.typed_data(), out,
                 key[0], key[1], asked[2], value[1] / key[1], key[2], key[3], value[3]};
  bool usual = group.rank == 64 && group.value_rank == 64;  // every OPT up to 1.3b, but for what was cut
  const int64_t bytes = keys.size_bytes() + values.size_bytes();
  InParallel(pool, group.batch * group.clusters, bytes, [&](int64_t task) {
    int64_t sequence = task / group.clusters, cluster = task % group.clusters;
    usual ? group.template Attend<64>(sequence, cluster) : group.template Attend<0>(sequence, cluster);
  });
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::PRED> allowed, ffi::RemainingArgs scales, ffi::ResultBuffer<ffi::F32> out) {
  const BFloat16* scale[2] = {nullptr, nullptr};
  for (size_t index = 0; index < scales.size(); ++index)
    scale[index] = static_cast<const BFloat16*>(scales.get<ffi::AnyBuffer>(index)->untyped_data());
  auto attend = keys.element_type() == ffi::F32 ? AttendAll<float>
                : keys.element_type() == ffi::BF16 ? AttendAll<BFloat16> : AttendAll<int8_t>;
  attend(pool, query, keys, values, scale[0], scale[1], allowed, out->typed_data());
  return ffi::Error::Success();
}

// ---- Products of a few rows -----------------------------------------------------------------------------------------

constexpr int kDeep = 8;  // rows of the matrix read at once
constexpr int kWide = 2;  // vectors of its columns read at once
constexpr int64_t kPanel = 1536;  // columns whose sums stay in the nearest caches

// out [M, N] = rows [M, K] matrix [K, N], of columns begin ... end - 1.
template <int M, typename T>
void TimesMatrix(const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin, int64_t end) {
  // Copies side by side: rows of `out` and of `rows` may lie a multiple of 4,096 bytes apart, and push each other out of
  // the first cache.
  alignas(64) float sums[M][kPanel + kLanes];
  float terms[kDeep][M];
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t width = std::min(kPanel, end - panel);
    std::memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < K; k += kDeep) {
      for (int m = 0; m < M; ++m)
        for (int d = 0; d < kDeep; ++d) terms[d][m] = rows[m * K + k + d];
      const T* weights = matrix + k * N + panel;
      for (int64_t n = 0; n < width; n += kWide * kLanes) {
        Vec sum[M][kWide];
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kWide; ++i) sum[m][i] = Load(sums[m] + n + i * kLanes);
#pragma GCC unroll 8
        for (int d = 0; d < kDeep; ++d) {
          Vec read[kWide];
          for (int i = 0; i < kWide; ++i) {
            const T* from = weights + d * N + n + i * kLanes;
            __builtin_prefetch(from + kDeep * N);
            read[i] = Load(from);
          }
          for (int m = 0; m < M; ++m)
            for (int i = 0; i < kWide; ++i) sum[m][i] += terms[d][m] * read[i];
        }
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kWide; ++i) Store(sums[m] + n + i * kLanes, sum[m][i]);
      }
    }
    for (int m = 0; m < M; ++m) std::copy_n(sums[m], width, out + m * N + panel);
  }
}

// out [M, N] = rows [M, K] times matrix [N, K] turned, of its rows begin ... end - 1, two at a time.
template <int M, typename T>
void TimesTurned(const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 2) {
    const T *one = matrix + n * K, *two = n + 1 < end ? one + K : one;
    Vec first[M] = {}, second[M] = {};
    for (int64_t k = 0; k < K; k += kLanes) {
      __builtin_prefetch(one + 2 * K + k);
      __builtin_prefetch(two + 2 * K + k);
      Vec read_one = Load(one + k), read_two = Load(two + k);
      for (int m = 0; m < M; ++m) {
        Vec row = Load(rows + m * K + k);
        first[m] += read_one * row;
        second[m] += read_two * row;
      }
    }
    for (int m = 0; m < M; ++m) {
      out[m * N + n] = Sum(first[m]);
      if (n + 1 < end) out[m * N + n + 1] = Sum(second[m]);
    }
  }
}

template <int M, typename T>
void Times(bool turned, const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin,
           int64_t end) {
  (turned ? TimesTurned<M, T> : TimesMatrix<M, T>)(rows, matrix, out, K, N, begin, end);
}

template <typename T>
void Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, const void* matrix, float* out, int64_t N,
              bool turned) {
  const int64_t M = rows.dimensions()[0], K = rows.dimensions()[1], step = kWide * kLanes;
  using Product = void (*)(bool, const float*, const T*, float*, int64_t, int64_t, int64_t, int64_t);
  constexpr Product products[] = {Times<1, T>, Times<2, T>, Times<3, T>, Times<4, T>,
                                  Times<5, T>, Times<6, T>, Times<7, T>, Times<8, T>};
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), parts = threads * (turned ? 8 : 1);
  const int64_t each = (N + parts * step - 1) / (parts * step) * step;
  InParallel(pool, (N + each - 1) / each, K * N * static_cast<int64_t>(sizeof(T)), [&](int64_t part) {
    products[M - 1](turned, rows.typed_data(), static_cast<const T*>(matrix), out, K, N, part * each,
                    std::min(N, (part + 1) * each));
  });
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::AnyBuffer matrix,
                   ffi::ResultBuffer<ffi::F32> out, bool turned) {
  auto multiply = matrix.element_type() == ffi::F32 ? Multiply<float>
                  : matrix.element_type() == ffi::BF16 ? Multiply<BFloat16> : Multiply<int8_t>;
  multiply(pool, rows, matrix.untyped_data(), out->typed_data(), out->dimensions()[1], turned);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("turned"));
