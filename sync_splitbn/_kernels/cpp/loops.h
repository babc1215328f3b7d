// The two loops over a batch, for each type of elements: one sums, one maps.
//
// N rows of C features at L positions, S splits. With channels last, memory is [N * L, C],
// otherwise [N, C, L]. Elements are computed with in float32 (float64 for float64 input): some
// dozens are summed about a value near them, and their sums in float64.

#pragma once

#include <cstdint>

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that elements are computed with.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Scalar = typename Accumulation<T>::type;

constexpr int64_t VECTOR_BYTES = 32;
// Features from which on a row is long enough for a loop of its own.
constexpr int64_t LONG_ROW = 128;
// Elements for which a thread is worth waking.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 14;

// No member functions: a file that is compiled for AVX2 must not share inline code with others.
struct Batch {
  int64_t rows, features, length, splits, threads;
  int64_t shares;             // parts of the work, at most one a thread
  int64_t positions_per_row;  // consecutive positions of few features, treated as one row
  bool channels_last;
  const int64_t* split;  // of each row
};

// Writes the sums of x and x^2, or with GRAD those of dy and dy * (x - mean), to totals [S, 2C].
//
// mean is [S, C], or null without GRAD; if it is not, x - mean stands for x. `totals` has room for
// [shares, S, 2C], zeros, the first of which is the result; without channels last `vectors` has
// room for [shares, C, 3] vectors.
template <bool GRAD, class T>
void sum_batch(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean, double* totals,
               void* vectors);

// The coefficients of (x - mean) * slope + offset + dy * scale, [S, positions_per_row, C] each.
template <class A>
struct Coefficients {
  A *mean, *slope, *offset, *scale;
};

// Writes that to y, without dy * scale if not GRAD.
template <bool GRAD, class T>
void map_batch(const Batch& batch, const Coefficients<Scalar<T>>& coefficients, const T* dy,
               const T* x, T* y);
