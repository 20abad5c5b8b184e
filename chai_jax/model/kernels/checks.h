// What handlers check before they touch memory, and what they say: for decode_cpu.cc and products_cpu.cc.
//
// XLA hands over dense arrays, in the order of their axes unless the caller asks for another: shape and type say how many
// bytes there are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "xla/ffi/api/ffi.h"

namespace {

inline bool Is(xla::ffi::Span<const int64_t> shape, std::initializer_list<int64_t> expected) {
  return std::equal(shape.begin(), shape.end(), expected.begin(), expected.end());
}

inline xla::ffi::Error Wrong(const char* why) { return xla::ffi::Error::InvalidArgument(why); }

// Of what `InParallel` returns; nothing but the want of memory is thrown.
inline xla::ffi::Error AllDone(bool done) {
  return done ? xla::ffi::Error::Success() : xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "no memory");
}

}  // namespace
