// Vectors of GCC and clang, 32 bytes of what elements are computed with; for loops.cpp alone.

#pragma once

#if defined(__x86_64__)
#define X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#endif

#include "loops.h"

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Ints __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));

template <class To, class From>
inline To bits_of(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from, "the same memory");
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// A vector of what elements are computed with, and the same elements in memory.
template <class T>
struct Type;

template <class S>
struct SameInMemory {
  typedef S Vector __attribute__((vector_size(32)));
  using Packed = Vector;
  static Vector unpack(Packed packed) { return packed; }
  static Packed pack(Vector vector) { return vector; }
};

struct HalfInMemory {
  using Vector = Floats;
  using Packed = Shorts;
};

template <>
struct Type<float> : SameInMemory<float> {};
template <>
struct Type<double> : SameInMemory<double> {};

template <>
struct Type<Bfloat16> : HalfInMemory {
  static Vector unpack(Packed packed) {
    return bits_of<Floats>(__builtin_convertvector(packed, Ints) << 16);
  }
  static Packed pack(Vector vector) {
    const Ints bits = bits_of<Ints>(vector);
    // Round to nearest even; a NaN stays one.
    const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Ints result = vector == vector ? rounded : (bits >> 16) | 64;
#ifdef X86
    const __m256i wide = bits_of<__m256i>(result);
    const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
    return bits_of<Shorts>(_mm_packus_epi32(low, high));
#else
    return __builtin_convertvector(result, Shorts);
#endif
  }
};

template <>
struct Type<Half> : HalfInMemory {
#ifdef X86
  static Vector unpack(Packed packed) { return _mm256_cvtph_ps(bits_of<__m128i>(packed)); }
  static Packed pack(Vector vector) { return bits_of<Packed>(_mm256_cvtps_ph(vector, 0)); }
#else
  typedef _Float16 Halves __attribute__((vector_size(16)));
  static Vector unpack(Packed packed) {
    return __builtin_convertvector(bits_of<Halves>(packed), Floats);
  }
  static Packed pack(Vector vector) {
    return bits_of<Packed>(__builtin_convertvector(vector, Halves));
  }
#endif
};

template <class T>
using Vector = typename Type<T>::Vector;
template <class T>
constexpr int64_t LANES = 32 / sizeof(Scalar<T>);

// How many elements of a vector there are.
struct All {};
struct Some {
  int64_t n;
};

// Calls body(i, All or Some) for n elements, a vector at a time.
template <class T, class Body>
inline void vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) body(i, All());
  if (i < n) body(i, Some{n - i});
}

template <class T>
inline Vector<T> read(const T* from, All) {
  typename Type<T>::Packed packed;
  __builtin_memcpy(&packed, from, sizeof packed);
  return Type<T>::unpack(packed);
}

// Zeros behind the last element.
template <class T>
inline Vector<T> read(const T* from, Some some) {
  T padded[LANES<T>] = {};
  for (int64_t i = 0; i < some.n; i++) padded[i] = from[i];
  return read(padded, All());
}

inline float read(const float* from) { return *from; }
inline double read(const double* from) { return *from; }
template <class T>
inline float read(const T* from) {
  return read(from, Some{1})[0];
}

template <class T>
inline Vector<T> broadcast(Scalar<T> value) {
  return value - Vector<T>{};
}

// The mean of the middle two of four numbers or vectors: one outlier among them does not move it.
template <class V>
inline V middle(const V& a, const V& b, const V& c, const V& d) {
  const V low = a < b ? a : b, high = a < b ? b : a;
  const V other_low = c < d ? c : d, other_high = c < d ? d : c;
  return (low < other_low ? other_low : low) / 2 + (high < other_high ? high : other_high) / 2;
}

// With STREAM it is written past the cache, and `to` is aligned to what is written.
template <bool STREAM, class T>
inline void write(Vector<T> vector, T* to, All) {
  const auto packed = Type<T>::pack(vector);
#ifdef X86
  if constexpr (STREAM && sizeof packed == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_of<__m256i>(packed));
  else if constexpr (STREAM)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_of<__m128i>(packed));
#endif
  __builtin_memcpy(to, &packed, sizeof packed);
}

template <bool STREAM, class T>
inline void write(Vector<T> vector, T* to, Some some) {
  T padded[LANES<T>];
  write<false>(vector, padded, All());
  for (int64_t i = 0; i < some.n; i++) to[i] = padded[i];
}

}  // namespace
