// The loops of loops.h, compiled for AVX2 on x86: the caller asks the processor first.
//
// Nothing of the standard library is used: its inline functions, compiled here for AVX2, might be
// the ones that the linker keeps for code that runs on any processor.

#include "vectors.h"

// Of the OpenMP that torch has loaded, whoever compiles this; the threads of a second one would
// compete with torch's.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}

namespace {

// Positions of one feature next to each other, and rows, added up in float32. Roundings of half
// precision's coarse values do not cancel: fewer of those.
template <class T>
constexpr int64_t RUN = sizeof(T) < 4 ? 1024 : 2048;
template <class T>
constexpr int64_t ROWS = sizeof(T) < 4 ? 16 : 32;
// Rows near one value, and features gone through at once.
constexpr int64_t DEPTH = 128, WIDTH = 2048;
// Bytes of a result that would push what else is in the cache out of it.
constexpr int64_t LARGE = 1 << 24;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t elements(const Batch& batch) { return batch.rows * batch.features * batch.length; }

// The end of the rows from `row` on that are of one split, at most `limit` of them.
int64_t end_of_split(const Batch& batch, int64_t row, int64_t limit) {
  const int64_t last = least(batch.rows, row + limit);
  int64_t end = row + 1;
  while (end < last && batch.split[end] == batch.split[row]) end++;
  return end;
}

// Calls body(share) for each share, by the threads of the OpenMP that torch has loaded.
template <class Body>
void parallel(const Batch& batch, const Body& body) {
  if (batch.shares == 1 || !GOMP_parallel) {
    for (int64_t share = 0; share < batch.shares; share++) body(share);
    return;
  }
  struct Work {
    const Batch& batch;
    const Body& body;
  } work{batch, body};
  const auto run = [](void* data) {
    const Work& work = *static_cast<Work*>(data);
    const int64_t step = omp_get_num_threads();
    for (int64_t i = omp_get_thread_num(); i < work.batch.shares; i += step) work.body(i);
  };
  // Always all threads of the pool: starting and ending some of them takes longer.
  GOMP_parallel(run, &work, batch.threads, 0);
}

// Calls body(begin, end, split) for a share of all positions, one split's at a time.
template <class Body>
void positions(const Batch& batch, int64_t share, int64_t limit, const Body& body) {
  const int64_t all = batch.rows * batch.length, length = batch.length;
  const int64_t end = all * (share + 1) / batch.shares;
  for (int64_t at = all * share / batch.shares, to; at < end; at = to) {
    const int64_t row = at / length;
    to = least(least(end, at + limit), end_of_split(batch, row, limit / length + 2) * length);
    body(at, to, batch.split[row]);
  }
}

// A share of a batch [N, C, L]: of its rows, or, where they are few, of the features of all.
struct Block {
  int64_t row, row_end, feature, feature_end;
  Block(const Batch& batch, int64_t share)
      : row(0), row_end(batch.rows), feature(0), feature_end(batch.features) {
    const bool few = batch.rows < batch.shares;
    int64_t &begin = few ? feature : row, &end = few ? feature_end : row_end;
    begin = end * share / batch.shares;
    end = end * (share + 1) / batch.shares;
  }
};

// Adds up u and u * v, where v is x - near, and u is dy, or v where there is no dy.
template <bool GRAD, class T, class N>
inline void add(const T* dy, const T* x, Vector<T> near, N n, Vector<T>& sum, Vector<T>& product) {
  const Vector<T> v = read(x, n) - near, u = GRAD ? read(dy, n) : v;
  sum += u;
  product += u * v;
}

// Adds what n elements of each feature gave to totals, [2C]: of u and u * v as they are, or, if
// ABOUT_ZERO, of x and x^2.
template <bool ABOUT_ZERO, class A>
inline void total(const A* __restrict sums, const A* __restrict products, const A* __restrict near,
                  int64_t n, int64_t width, double* __restrict plain, double* __restrict squares) {
  const double count = n;
  for (int64_t c = 0; c < width; c++) {
    const double sum = sums[c], product = products[c], shift = near[c], around = count * shift;
    plain[c] += ABOUT_ZERO ? sum + around : sum;
    squares[c] += ABOUT_ZERO ? product + shift * (2 * sum + around) : product;
  }
}

// Adds up rows of features from `row` to `end`, ONCE of them at a time, and moves `row` on.
template <bool GRAD, int ONCE, class T>
inline void add_features(const T* dy, const T* x, int64_t& row, int64_t end, int64_t features,
                         int64_t width, const Scalar<T>* near, Scalar<T>* sums,
                         Scalar<T>* products) {
  for (; row + ONCE <= end; row += ONCE)
    vectors<T>(width, [&](int64_t c, auto some) {
      Vector<T> sum = read(sums + c, All()), product = read(products + c, All());
      const Vector<T> shift = read(near + c, All());
      for (int64_t i = (row * features) + c, k = 0; k < ONCE; k++, i += features)
        add<GRAD>(dy + i, x + i, shift, some, sum, product);
      write<false>(sum, sums + c, All());
      write<false>(product, products + c, All());
    });
}

// Adds up n positions of all features, a few times DEPTH at most.
template <bool GRAD, class T>
void add_positions(const T* dy, const T* x, const Scalar<T>* mean, int64_t n, int64_t features,
                   int64_t positions_per_row, double* totals) {
  const auto add_totals = GRAD || mean ? total<false, Scalar<T>> : total<true, Scalar<T>>;
  for (int64_t from = 0; from < features; from += WIDTH) {
    const int64_t width = least(WIDTH, features - from);
    // Room for the whole of the last vector.
    constexpr int64_t SIZE = WIDTH + LANES<T>;
    alignas(32) Scalar<T> near[SIZE], sums[SIZE], products[SIZE];
    vectors<T>(width, [&](int64_t c, auto some) {
      Vector<T> shift{};
      // Not the first position, and out of step with the sizes of images.
      const auto sample = [&](int64_t i) {
        return read(x + n * (5 * i + 1) / 41 * features + from + c, some);
      };
      if (GRAD || mean)
        shift = read(mean + from + c, some);
      else
        // Twice the middle of four: rows are added up one by one, which costs digits far from 0.
        shift = middle(sample(0), sample(1), sample(2), sample(3)) / 2 +
                middle(sample(4), sample(5), sample(6), sample(7)) / 2;
      write<false>(shift, near + c, All());
    });
    for (int64_t i = width; i < positions_per_row * width; i++) near[i] = near[i - width];
    for (int64_t at = 0; at < n;) {
      // The last positions, too few for a row of several, are rows of one.
      const int64_t once = n - at < positions_per_row ? 1 : positions_per_row;
      const int64_t stride = features * once;
      const int64_t rows = least((n - at) / once, ROWS<T>);
      const T *of_dy = dy + at * features + from, *of_x = x + at * features + from;
      for (int64_t i = 0; i < width * once + LANES<T>; i++) sums[i] = products[i] = 0;
      int64_t row = 0;
      // Short rows one by one, as memory is read fastest; of long ones these sums leave the cache.
      if (width == WIDTH)
        add_features<GRAD, 4>(of_dy, of_x, row, rows, stride, width, near, sums, products);
      add_features<GRAD, 1>(of_dy, of_x, row, rows, stride, width * once, near, sums, products);
      for (int64_t i = 0; i < once * width; i += width)
        add_totals(sums + i, products + i, near, rows, width, totals + from,
                  totals + features + from);
      at += rows * once;
    }
  }
}

// The sums of a feature before they go to its totals; VECTORS_PER_FEATURE of memory.
template <class T>
struct Feature {
  Vector<T> sum, product;
  Scalar<T> near;
};

// Read from its middle, a mask of the last elements of a vector.
template <class A>
constexpr A LAST_ELEMENTS[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};

// Adds up n positions of one feature, next to each other in memory.
template <bool GRAD, class T>
inline void add_run(const T* dy, const T* x, int64_t n, Feature<T>& feature) {
  constexpr int64_t N = LANES<T>;
  const Vector<T> near = broadcast<T>(feature.near);
  Vector<T> sums[4] = {}, products[4] = {};
  int64_t at = 0;
  for (; at + 4 * N <= n; at += 4 * N)
    for (int i = 0; i < 4; i++)
      add<GRAD>(dy + at + i * N, x + at + i * N, near, All(), sums[i], products[i]);
  for (; at + N <= n; at += N) add<GRAD>(dy + at, x + at, near, All(), sums[0], products[0]);
  if (at < n && n < N) {
    Vector<T> v = read(x, Some{n}) - near;
    for (int64_t i = n; i < N; i++) v[i] = 0;
    const Vector<T> u = GRAD ? read(dy, Some{n}) : v;
    sums[1] += u;
    products[1] += u * v;
  } else if (at < n) {
    // The last vector there is, and of it what has not been added yet.
    const auto fresh = read(LAST_ELEMENTS<Scalar<T>> + 8 - N + n - at, All()) > 0;
    const Vector<T> v = fresh ? read(x + n - N, All()) - near : Vector<T>{};
    const Vector<T> u = GRAD ? (fresh ? read(dy + n - N, All()) : Vector<T>{}) : v;
    sums[1] += u;
    products[1] += u * v;
  }
  feature.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  feature.product += (products[0] + products[1]) + (products[2] + products[3]);
}

// Adds up rows of [C, L], those features from `from` to `to`.
template <bool GRAD, class T>
void add_rows(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean, int64_t rows,
              int64_t from, int64_t to, Feature<T>* sums, double* totals) {
  const auto add_totals = GRAD || mean ? total<false, double> : total<true, double>;
  const int64_t features = batch.features, length = batch.length;
  for (int64_t start = 0; start < length; start += RUN<T>) {
    const int64_t n = least(RUN<T>, length - start);
    for (int64_t c = from; c < to; c++) {
      // Beside the first position, which borders and marks make an outlier.
      const auto sample = [&](int64_t i) {
        const int64_t at = least(n * i / 4 + 1, n - 1);
        return read(x + (rows * i / 4 * features + c) * length + start + at);
      };
      if (GRAD || mean)
        sums[c].near = mean[c];
      else
        sums[c].near = middle(sample(0), sample(1), sample(2), sample(3));
      sums[c].sum = sums[c].product = Vector<T>{};
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t c = from; c < to; c++) {
        const int64_t at = (row * features + c) * length + start;
        add_run<GRAD>(dy + at, x + at, n, sums[c]);
      }
    for (int64_t c = from; c < to; c++) {
      double sum = 0, product = 0, near = sums[c].near;
      for (int64_t i = 0; i < LANES<T>; i++) {
        sum += sums[c].sum[i];
        product += sums[c].product[i];
      }
      add_totals(&sum, &product, &near, n * rows, 1, totals + c, totals + features + c);
    }
  }
}

// Coefficients of features next to each other, or one feature's.
template <class T, class N>
inline Vector<T> pick(const Scalar<T>* from, int64_t i, N n) {
  return read(from + i, n);
}
template <class T, class N>
inline Vector<T> pick(Vector<T> one, int64_t, N) {
  return one;
}

template <bool GRAD, bool STREAM, class T, class C>
inline void map_run(const T* dy, const T* x, T* y, int64_t n, C mean, C slope, C offset, C scale) {
  const auto map = [&](int64_t i, auto some) {
    const Vector<T> centred = read(x + i, some) - pick<T>(mean, i, some);
    Vector<T> result = centred * pick<T>(slope, i, some) + pick<T>(offset, i, some);
    if (GRAD) result += read(dy + i, some) * pick<T>(scale, i, some);
    write<STREAM>(result, y + i, some);
  };
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) map(i, All());
  // The last vector there is, for the most part a second time, is faster than a part of one.
  if (i < n && n >= LANES<T>)
    map(n - LANES<T>, All());
  else if (i < n)
    map(i, Some{n});
}

template <bool GRAD, bool STREAM, class T>
void map_share(const Batch& batch, const Coefficients<Scalar<T>>& of, const T* dy, const T* x, T* y,
               int64_t share) {
  const int64_t features = batch.features, length = batch.length;
  if (batch.channels_last) {
    positions(batch, share, batch.rows * length, [&](int64_t at, int64_t to, int64_t split) {
      const int64_t width = features * batch.positions_per_row, c = split * width;
      for (int64_t i = at * features; i < to * features; i += width)
        map_run<GRAD, STREAM>(dy + i, x + i, y + i, least(width, to * features - i), of.mean + c,
                              of.slope + c, of.offset + c, of.scale + c);
    });
  } else {
    const Block block(batch, share);
    for (int64_t row = block.row; row < block.row_end; row++)
      for (int64_t feature = block.feature; feature < block.feature_end; feature++) {
        const int64_t c = batch.split[row] * features + feature;
        const int64_t i = (row * features + feature) * length;
        map_run<GRAD, STREAM>(dy + i, x + i, y + i, length, broadcast<T>(of.mean[c]),
                              broadcast<T>(of.slope[c]), broadcast<T>(of.offset[c]),
                              broadcast<T>(of.scale[c]));
      }
  }
#ifdef X86
  // Streaming stores are ordered by nothing else.
  if (STREAM) _mm_sfence();
#endif
}

}  // namespace

template <bool GRAD, class T>
void sum_batch(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean, double* totals,
               void* vectors) {
  const int64_t features = batch.features, length = batch.length, size = 2 * features;
  const int64_t all = batch.splits * size, shares = batch.shares;
  if (!elements(batch)) return;
  const auto mean_of = [&](int64_t split) { return GRAD || mean ? mean + split * features : nullptr; };
  parallel(batch, [&](int64_t share) {
    double* mine = totals + share * all;
    if (batch.channels_last)
      return positions(batch, share, DEPTH * batch.positions_per_row,
                       [&](int64_t at, int64_t to, int64_t split) {
                         const int64_t i = at * features;
                         add_positions<GRAD>(dy + i, x + i, mean_of(split), to - at, features,
                                             batch.positions_per_row, mine + split * size);
                       });
    Feature<T>* sums = static_cast<Feature<T>*>(vectors) + share * features;
    const Block block(batch, share);
    // Short rows together, long ones feature by feature, as memory is read fastest.
    const int64_t most = length > RUN<T> ? 1 : least(RUN<T> / length, ROWS<T>);
    const int64_t group = length > RUN<T> ? 1 : features;
    for (int64_t row = block.row, to; row < block.row_end; row = to) {
      to = least(block.row_end, end_of_split(batch, row, most));
      const int64_t i = row * features * length, split = batch.split[row];
      for (int64_t c = block.feature; c < block.feature_end; c += group)
        add_rows<GRAD>(batch, dy + i, x + i, mean_of(split), to - row, c,
                       least(block.feature_end, c + group), sums, mine + split * size);
    }
  });
  parallel(batch, [&](int64_t share) {
    for (int64_t i = all * share / shares; i < all * (share + 1) / shares; i++)
      for (int64_t other = 1; other < shares; other++) totals[i] += totals[other * all + i];
  });
}

template <bool GRAD, class T>
void map_batch(const Batch& batch, const Coefficients<Scalar<T>>& coefficients, const T* dy,
               const T* x, T* y) {
  if (!elements(batch)) return;
  const int64_t run = (batch.channels_last ? batch.features : batch.length) * sizeof(T);
  const bool large = elements(batch) * int64_t(sizeof(T)) >= LARGE;
  const bool aligned = (run | reinterpret_cast<intptr_t>(y)) % VECTOR_BYTES == 0;
  parallel(batch, [&](int64_t share) {
    if (large && aligned)
      map_share<GRAD, true>(batch, coefficients, dy, x, y, share);
    else
      map_share<GRAD, false>(batch, coefficients, dy, x, y, share);
  });
}

#define FOR_TYPE(T)                                                                              \
  template void sum_batch<false>(const Batch&, const T*, const T*, const Scalar<T>*, double*,    \
                                 void*);                                                         \
  template void sum_batch<true>(const Batch&, const T*, const T*, const Scalar<T>*, double*,     \
                                void*);                                                          \
  template void map_batch<false>(const Batch&, const Coefficients<Scalar<T>>&, const T*,         \
                                 const T*, T*);                                                  \
  template void map_batch<true>(const Batch&, const Coefficients<Scalar<T>>&, const T*, const T*, \
                                T*);
FOR_TYPE(float)
FOR_TYPE(double)
FOR_TYPE(Bfloat16)
FOR_TYPE(Half)

#if defined(X86) && defined(__clang__)
#pragma clang attribute pop
#endif
