// Attention of one new token over a stored cache, for CPUs.
//
// It is bound by memory: each key and value is read once, for all queries of its cluster, and from several places of an
// array at a time, since one stream does not fill a core's queue of loads. Compiled and registered by cpu.py; called by
// decode_cpu.py.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "softmax.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kStreams = 4;  // columns read at once, from as many stretches of the cache
constexpr int kAhead = 2048;  // bytes

template <typename T>
inline void Prefetch(const T* row, int64_t rank) {
  auto* bytes = reinterpret_cast<const char*>(row) + kAhead;
  for (int64_t at = 0; at < static_cast<int64_t>(rank * sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// A stored row in float32, so that queries that share it do not convert it one by one: in `copy`, where it is not so.
inline const float* Floats32(const float* row, int64_t, float*) { return row; }
template <typename T>
const float* Floats32(const T* row, int64_t rank, float* copy) {
  int64_t at = 0;
  for (; at + kLanes <= rank; at += kLanes) Store(copy + at, Load(row + at));
  for (; at < rank; ++at) copy[at] = ToFloat(row[at]);
  return copy;
}

// scores[q][s] = <query[q], keys[s]>; kRank is the rank where it is known when this is compiled, else 0.
template <int kRank, typename T>
void Scores(const float* query, int64_t queries, const T* keys, int64_t columns, int64_t any_rank, float* scores) {
  const int64_t rank = kRank ? kRank : any_rank, whole = rank / kLanes * kLanes, stretch = columns / kStreams;
  std::vector<float> copy(queries > 1 ? rank : 0);
  auto score = [&](int64_t row, int64_t column, const auto* key) {
    const float* asked = query + row * rank;
    Vec sums = {};
    for (int64_t at = 0; at < whole; at += kLanes) sums += Load(asked + at) * Load(key + at);
    float total = Sum(sums);
    for (int64_t at = whole; at < rank; ++at) total += asked[at] * ToFloat(key[at]);
    scores[row * columns + column] = total;
  };
  auto score_all = [&](int64_t column) {
    const T* key = keys + column * rank;
    Prefetch(key, rank);
    if (queries == 1) return score(0, column, key);
    const float* read = Floats32(key, rank, copy.data());
    for (int64_t row = 0; row < queries; ++row) score(row, column, read);
  };
  for (int64_t column = 0; column < stretch; ++column)
    for (int stream = 0; stream < kStreams; ++stream) score_all(column + stream * stretch);
  for (int64_t column = kStreams * stretch; column < columns; ++column) score_all(column);
}

// sums[q][r] = sum over s of weights[q][s] * values[s][r].
template <int kRank, typename T>
void Mix(const float* weights, int64_t queries, const T* values, int64_t columns, int64_t any_rank, float* sums) {
  const int64_t rank = kRank ? kRank : any_rank, whole = rank / kLanes * kLanes, stretch = columns / kStreams;
  std::vector<float> copy(queries > 1 ? kStreams * rank : 0);
  std::fill(sums, sums + queries * rank, 0.0f);
  auto mix = [&](int64_t row, int64_t column, const auto* const* read) {
    float weight[kStreams], *mixed = sums + row * rank;
    for (int stream = 0; stream < kStreams; ++stream)
      weight[stream] = weights[row * columns + column + stream * stretch];
    for (int64_t at = 0; at < whole; at += kLanes) {
      Vec sum = Load(mixed + at);
      for (int stream = 0; stream < kStreams; ++stream) sum += weight[stream] * Load(read[stream] + at);
      Store(mixed + at, sum);
    }
    for (int64_t at = whole; at < rank; ++at)
      for (int stream = 0; stream < kStreams; ++stream) mixed[at] += weight[stream] * ToFloat(read[stream][at]);
  };
  for (int64_t column = 0; column < stretch; ++column) {
    const T* rows[kStreams];
    for (int stream = 0; stream < kStreams; ++stream) {
      rows[stream] = values + (column + stream * stretch) * rank;
      Prefetch(rows[stream], rank);
    }
    if (queries == 1) {
      mix(0, column, rows);
      continue;
    }
    const float* read[kStreams];
    for (int stream = 0; stream < kStreams; ++stream)
      read[stream] = Floats32(rows[stream], rank, copy.data() + stream * rank);
    for (int64_t row = 0; row < queries; ++row) mix(row, column, read);
  }
  for (int64_t column = kStreams * stretch; column < columns; ++column)
    for (int64_t row = 0; row < queries; ++row)
      for (int64_t at = 0; at < rank; ++at)
        sums[row * rank + at] += weights[row * columns + column] * ToFloat(values[column * rank + at]);
}

// One group's arrays: query [B, C, q, R], keys [B, C, S, R], values [B, C v, S, Rv], int8's scales [B, heads, S] or
// nullptr, allowed [B, S], out [B, C, v q, Rv].
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
    std::vector<float> scores(queries * count), weights(value_scale ? queries * count : 0), totals(queries);
    Scores<kRank>(query + at * queries * rank, queries, keys + (at * columns + first) * rank, count, rank,
                  scores.data());
    if (key_scale) Scale(scores, key_scale + at * columns + first, count, scores);
    for (int64_t row = 0; row < queries; ++row)
      totals[row] = SoftmaxWeights(scores.data() + row * count, readable + first, count);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t value = at * heads + head;
      if (value_scale) Scale(scores, value_scale + value * columns + first, count, weights);
      float* sums = out + value * queries * value_rank;
      Mix<kRank>((value_scale ? weights : scores).data(), queries, values + (value * columns + first) * value_rank,
                 count, value_rank, sums);
      for (int64_t row = 0; row < queries; ++row)
        for (int64_t entry = 0; entry < value_rank; ++entry) sums[row * value_rank + entry] /= totals[row];
    }
  }

  // Each row of `count` columns times the columns' scales.
  static void Scale(const std::vector<float>& from, const BFloat16* scale, int64_t count, std::vector<float>& to) {
    for (size_t begin = 0; begin < from.size(); begin += count)
      for (int64_t column = 0; column < count; ++column)
        to[begin + column] = from[begin + column] * ToFloat(scale[column]);
  }
};

// `scales`: those of int8 keys and values, or none.
template <typename T>
ffi::Error AttendAll(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::BufferR2<ffi::PRED> allowed, const BFloat16* const (&scales)[2], float* out) {
  auto asked = query.dimensions(), key = keys.dimensions(), value = values.dimensions();
  Group<T> group{query.typed_data(),
                 static_cast<const T*>(keys.untyped_data()),
                 static_cast<const T*>(values.untyped_data()),
                 scales[0], scales[1], allowed.typed_data(), out,
                 key[0], key[1], asked[2], value[1] / key[1], key[2], key[3], value[3]};
  bool usual = group.rank == 64 && group.value_rank == 64;  // of most small models, but for what was cut
  const int64_t bytes = keys.size_bytes() + values.size_bytes();
  return AllDone(InParallel(pool, group.batch * group.clusters, bytes, [&](int64_t task) {
    int64_t sequence = task / group.clusters, cluster = task % group.clusters;
    usual ? group.template Attend<64>(sequence, cluster) : group.template Attend<0>(sequence, cluster);
  }));
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::BufferR2<ffi::PRED> allowed, ffi::RemainingArgs scales,
                     ffi::ResultBufferR4<ffi::F32> out) {
  auto asked = query.dimensions(), key = keys.dimensions(), value = values.dimensions();
  if (key.size() != 4 || value.size() != 4) return Wrong("keys and values have four axes");
  const int64_t batch = key[0], clusters = key[1], columns = key[2], queries = asked[2], heads = value[1];
  if (clusters < 1 || columns < 1 || heads % clusters) return Wrong("expected columns, and as many values for each key");
  if (!Is(asked, {batch, clusters, queries, key[3]}) || !Is(value, {batch, heads, columns, value[3]}) ||
      !Is(allowed.dimensions(), {batch, columns}) ||
      !Is(out->dimensions(), {batch, clusters, queries * (heads / clusters), value[3]}))
    return Wrong("expected query [B, C, q, R], keys [B, C, S, R], values [B, C v, S, Rv], allowed [B, S] and out "
                 "[B, C, v q, Rv]");

  const auto stored = keys.element_type();
  if (values.element_type() != stored) return Wrong("keys and values are of one type");
  if (scales.size() != (stored == ffi::S8 ? 2 : 0)) return Wrong("expected two scales of int8, and of others none");
  const BFloat16* scale[2] = {nullptr, nullptr};
  for (size_t index = 0; index < scales.size(); ++index) {
    auto given = scales.get<ffi::BufferR3<ffi::BF16>>(index);
    if (!given || !Is(given->dimensions(), {batch, index ? heads : clusters, columns}))
      return Wrong("expected scales of bfloat16 [B, heads, S]");
    scale[index] = reinterpret_cast<const BFloat16*>(given->untyped_data());
  }
  switch (stored) {
    case ffi::F32: return AttendAll<float>(pool, query, keys, values, allowed, scale, out->typed_data());
    case ffi::BF16: return AttendAll<BFloat16>(pool, query, keys, values, allowed, scale, out->typed_data());
    case ffi::S8: return AttendAll<int8_t>(pool, query, keys, values, allowed, scale, out->typed_data());
    default: return Wrong("expected keys and values of float32, bfloat16 or int8");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR4<ffi::F32>>());
