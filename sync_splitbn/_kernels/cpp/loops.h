// The two loops over a batch: one adds up, one maps; each for two layouts of memory.
//
// N rows of C features at L positions, S splits. Where the features are innermost, memory is
// [N * L, C], otherwise [N, C, L]. Elements are computed with in float32 (float64 for float64
// input): some dozens are added up, about a value near them, and their sums in float64.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <vector>

// Positions of one feature next to each other, and rows, added up in float32. Roundings of half
// precision's coarse values do not cancel: fewer of those.
template <class T>
constexpr int64_t RUN = sizeof(T) < 4 ? 1024 : 2048;
template <class T>
constexpr int64_t ROWS = sizeof(T) < 4 ? 16 : 32;
// Rows near one value, and features gone through at once.
constexpr int64_t DEPTH = 128, WIDTH = 2048;
// Features at least that are worth a loop of their own.
constexpr int64_t FOLDED = 128;
// Elements for which a thread is worth waking.
constexpr int64_t GRAIN = 1 << 14;
// Bytes of a result that would push what else is in the cache out of it.
constexpr int64_t LARGE = 1 << 24;

struct Batch {
  int64_t rows, features, length, splits, threads;
  bool last;
  std::vector<int64_t> split;  // of each row

  int64_t elements() const { return rows * features * length; }
  // Positions of few features that are gone through as one of many.
  int64_t fold() const { return last ? std::max(FOLDED / features, int64_t(1)) : 1; }
  int64_t shares() const { return std::clamp(elements() / GRAIN, int64_t(1), threads); }

  // The end of the rows from `row` on that are of its split, `most` of them.
  int64_t until(int64_t row, int64_t most) const {
    const int64_t last = std::min(rows, row + most);
    int64_t end = row + 1;
    while (end < last && split[end] == split[row]) end++;
    return end;
  }
};

// Calls body(share) for each share, by torch's threads: always all of them, as it is quickest.
template <class Body>
void parallel(const Batch& batch, const Body& body) {
  const int64_t shares = batch.shares();
  if (shares == 1) return body(0);
#pragma omp parallel for num_threads(batch.threads) schedule(static, 1)
  for (int64_t share = 0; share < shares; share++) body(share);
}

// Calls body(begin, end, split) for a share of all positions, one split's at a time.
template <class Body>
void positions(const Batch& batch, int64_t share, int64_t most, const Body& body) {
  const int64_t all = batch.rows * batch.length, length = batch.length;
  const int64_t end = all * (share + 1) / batch.shares();
  for (int64_t at = all * share / batch.shares(), to; at < end; at = to) {
    const int64_t row = at / length;
    to = std::min({end, at + most, batch.until(row, most / length + 2) * length});
    body(at, to, batch.split[row]);
  }
}

// A share of a batch [N, C, L]: of its rows, or, where they are few, of the features of all.
struct Block {
  int64_t row, row_end, feature, feature_end;
  Block(const Batch& batch, int64_t share)
      : row(0), row_end(batch.rows), feature(0), feature_end(batch.features) {
    const bool few = batch.rows < batch.shares();
    int64_t &begin = few ? feature : row, &end = few ? feature_end : row_end;
    begin = end * share / batch.shares();
    end = end * (share + 1) / batch.shares();
  }
};

// Adds up u and u * v, where v is x - near, and u is dy, or v where there is no dy.
template <bool DY, class T, class N>
inline void add(const T* dy, const T* x, Vector<T> near, N n, Vector<T>& sum, Vector<T>& product) {
  const Vector<T> v = read(x, n) - near, u = DY ? read(dy, n) : v;
  sum += u;
  product += u * v;
}

// Adds what n elements of each feature gave to totals, [2C]: of u and u * v, or of x and x^2.
template <bool DY, class A>
inline void total(const A* __restrict sums, const A* __restrict products, const A* __restrict near,
                  int64_t n, int64_t width, double* __restrict plain, double* __restrict squares) {
  const double count = n;
  for (int64_t c = 0; c < width; c++) {
    const double sum = sums[c], product = products[c], shift = near[c], around = count * shift;
    plain[c] += DY ? sum : sum + around;
    squares[c] += DY ? product : product + shift * (2 * sum + around);
  }
}

// Adds up rows of features, so many at once, from one on to another.
template <bool DY, int ONCE, class T>
inline void add_features(const T* dy, const T* x, int64_t& row, int64_t end, int64_t features,
                         int64_t width, const Scalar<T>* near, Scalar<T>* sums,
                         Scalar<T>* products) {
  for (; row + ONCE <= end; row += ONCE)
    vectors<T>(width, [&](int64_t c, auto some) {
      Vector<T> sum = read(sums + c, All()), product = read(products + c, All());
      const Vector<T> shift = read(near + c, All());
      for (int64_t i = (row * features) + c, k = 0; k < ONCE; k++, i += features)
        add<DY>(dy + i, x + i, shift, some, sum, product);
      write<false>(sum, sums + c, All());
      write<false>(product, products + c, All());
    });
}

// Adds up n positions of all features, a few times DEPTH at most.
template <bool DY, class T>
void add_positions(const T* dy, const T* x, const Scalar<T>* mean, int64_t n, int64_t features,
                   int64_t fold, double* totals) {
  for (int64_t from = 0; from < features; from += WIDTH) {
    const int64_t width = std::min(WIDTH, features - from);
    // With place for the whole of the last vector.
    constexpr int64_t SIZE = WIDTH + LANES<T>;
    alignas(32) Scalar<T> near[SIZE], sums[SIZE], products[SIZE];
    vectors<T>(width, [&](int64_t c, auto some) {
      Vector<T> shift{};
      if constexpr (DY)
        shift = read(mean + from + c, some);
      else
        for (int i = 0; i < 4; i++) shift += read(x + n * i / 4 * features + from + c, some) / 4;
      write<false>(shift, near + c, All());
    });
    for (int64_t i = 1; i < fold; i++) std::copy_n(near, width, near + i * width);
    // Several positions are one row, as long as there are so many.
    for (int64_t at = 0; at < n;) {
      const int64_t once = n - at < fold ? 1 : fold, stride = features * once;
      const int64_t rows = std::min((n - at) / once, ROWS<T>);
      const T *of_dy = dy + at * features + from, *of_x = x + at * features + from;
      std::fill_n(sums, width * once + LANES<T>, 0);
      std::fill_n(products, width * once + LANES<T>, 0);
      int64_t row = 0;
      // Short rows one by one, as memory is read fastest; of long ones these sums leave the cache.
      if (width == WIDTH)
        add_features<DY, 4>(of_dy, of_x, row, rows, stride, width, near, sums, products);
      add_features<DY, 1>(of_dy, of_x, row, rows, stride, width * once, near, sums, products);
      for (int64_t i = 0; i < once * width; i += width)
        total<DY>(sums + i, products + i, near, rows, width, totals + from,
                  totals + features + from);
      at += rows * once;
    }
  }
}

// What is added up of a feature before it goes to its totals.
template <class T>
struct Feature {
  Vector<T> sum, product;
  Scalar<T> near;
};

template <class A>
constexpr A KEEP[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};

// Adds up n positions of one feature, next to each other in memory.
template <bool DY, class T>
inline void add_run(const T* dy, const T* x, int64_t n, Feature<T>& found) {
  constexpr int64_t N = LANES<T>;
  const Vector<T> near = everywhere<T>(found.near);
  Vector<T> sums[4] = {}, products[4] = {};
  int64_t at = 0;
  for (; at + 4 * N <= n; at += 4 * N)
    for (int i = 0; i < 4; i++)
      add<DY>(dy + at + i * N, x + at + i * N, near, All(), sums[i], products[i]);
  for (; at + N <= n; at += N) add<DY>(dy + at, x + at, near, All(), sums[0], products[0]);
  if (at < n && n < N) {
    Vector<T> v = read(x, Some{n}) - near;
    for (int64_t i = n; i < N; i++) v[i] = 0;
    const Vector<T> u = DY ? read(dy, Some{n}) : v;
    sums[1] += u;
    products[1] += u * v;
  } else if (at < n) {
    // The last vector there is, and of it what has not been added yet.
    const auto fresh = read(KEEP<Scalar<T>> + 8 - N + n - at, All()) > 0;
    const Vector<T> v = fresh ? read(x + n - N, All()) - near : Vector<T>{};
    const Vector<T> u = DY ? (fresh ? read(dy + n - N, All()) : Vector<T>{}) : v;
    sums[1] += u;
    products[1] += u * v;
  }
  found.sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  found.product += (products[0] + products[1]) + (products[2] + products[3]);
}

// Adds up rows of [C, L], those features from `from` to `to`.
template <bool DY, class T>
void add_rows(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean, int64_t rows,
              int64_t from, int64_t to, Feature<T>* found, double* totals) {
  const int64_t features = batch.features, length = batch.length;
  for (int64_t start = 0; start < length; start += RUN<T>) {
    const int64_t n = std::min(RUN<T>, length - start);
    for (int64_t c = from; c < to; c++) {
      Scalar<T> near = DY ? mean[c] : 0;
      for (int64_t i = 0; !DY && i < 4; i++)
        near += read(x + (rows * i / 4 * features + c) * length + start + n * i / 4) / 4;
      found[c].near = near;
      found[c].sum = found[c].product = Vector<T>{};
    }
    for (int64_t row = 0; row < rows; row++)
      for (int64_t c = from; c < to; c++) {
        const int64_t at = (row * features + c) * length + start;
        add_run<DY>(dy + at, x + at, n, found[c]);
      }
    for (int64_t c = from; c < to; c++) {
      double sum = 0, product = 0, near = found[c].near;
      for (int64_t i = 0; i < LANES<T>; i++) {
        sum += found[c].sum[i];
        product += found[c].product[i];
      }
      total<DY>(&sum, &product, &near, n * rows, 1, totals + c, totals + features + c);
    }
  }
}

// Returns [S, 2C]: the sums of x and x^2, or, if DY, of dy and dy * (x - mean), mean [S, C].
template <bool DY, class T>
std::vector<double> add_up(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean) {
  const int64_t features = batch.features, length = batch.length, size = 2 * features;
  const int64_t all = batch.splits * size, shares = batch.shares(), fold = batch.fold();
  std::vector<double> totals(shares * all);
  if (!batch.elements()) return totals;
  std::vector<Feature<T>> found(batch.last ? 0 : shares * features);
  parallel(batch, [&](int64_t share) {
    double* mine = totals.data() + share * all;
    if (batch.last)
      return positions(batch, share, DEPTH * fold, [&](int64_t at, int64_t to, int64_t split) {
        const int64_t i = at * features;
        add_positions<DY>(dy + i, x + i, mean + split * features, to - at, features, fold,
                          mine + split * size);
      });
    const Block block(batch, share);
    // Short rows together, long ones feature by feature, as memory is read fastest.
    const int64_t most = std::clamp(RUN<T> / length, int64_t(1), ROWS<T>);
    const int64_t group = length > RUN<T> ? 1 : features;
    for (int64_t row = block.row, to; row < block.row_end; row = to) {
      to = std::min(block.row_end, batch.until(row, most));
      const int64_t i = row * features * length, split = batch.split[row];
      for (int64_t c = block.feature; c < block.feature_end; c += group)
        add_rows<DY>(batch, dy + i, x + i, mean + split * features, to - row, c,
                     std::min(block.feature_end, c + group), found.data() + share * features,
                     mine + split * size);
    }
  });
  parallel(batch, [&](int64_t share) {
    for (int64_t i = all * share / shares; i < all * (share + 1) / shares; i++)
      for (int64_t other = 1; other < shares; other++) totals[i] += totals[other * all + i];
  });
  totals.resize(all);
  return totals;
}

// (x - mean) * slope + offset, with dy * scale added to it where there is a dy.
template <class A>
struct Coefficients {
  A mean, slope, offset, scale;
};

// Coefficients for each split and feature, [S, C], and again for positions that are folded.
template <class A>
struct Map {
  std::vector<A> mean, slope, offset, scale;
  explicit Map(int64_t size) : mean(size), slope(size), offset(size), scale(size) {}

  void set(const Batch& batch, int64_t split, int64_t feature, const Coefficients<A>& of) {
    for (int64_t i = 0; i < batch.fold(); i++) {
      const int64_t at = (split * batch.fold() + i) * batch.features + feature;
      mean[at] = of.mean;
      slope[at] = of.slope;
      offset[at] = of.offset;
      scale[at] = of.scale;
    }
  }
};

// Coefficients of features next to each other, or one feature's.
template <class T, class N>
inline Vector<T> pick(const Scalar<T>* from, int64_t i, N n) {
  return read(from + i, n);
}
template <class T, class N>
inline Vector<T> pick(Vector<T> one, int64_t, N) {
  return one;
}

template <bool DY, bool PAST, class T, class C>
inline void map_run(const T* dy, const T* x, T* y, int64_t n, C mean, C slope, C offset, C scale) {
  const auto map = [&](int64_t i, auto some) {
    const Vector<T> centred = read(x + i, some) - pick<T>(mean, i, some);
    Vector<T> result = centred * pick<T>(slope, i, some) + pick<T>(offset, i, some);
    if (DY) result += read(dy + i, some) * pick<T>(scale, i, some);
    write<PAST>(result, y + i, some);
  };
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) map(i, All());
  // The last vector there is, for the most part a second time, is faster than a part of one.
  if (i < n && n >= LANES<T>)
    map(n - LANES<T>, All());
  else if (i < n)
    map(i, Some{n});
}

template <bool DY, bool PAST, class T>
void map_share(const Batch& batch, const Map<Scalar<T>>& map, const T* dy, const T* x, T* y,
               int64_t share) {
  const int64_t features = batch.features, length = batch.length;
  if (batch.last) {
    positions(batch, share, batch.rows * length, [&](int64_t at, int64_t to, int64_t split) {
      const int64_t width = features * batch.fold(), of = split * width;
      for (int64_t i = at * features; i < to * features; i += width)
        map_run<DY, PAST>(dy + i, x + i, y + i, std::min(width, to * features - i), &map.mean[of],
                          &map.slope[of], &map.offset[of], &map.scale[of]);
    });
  } else {
    const Block block(batch, share);
    for (int64_t row = block.row; row < block.row_end; row++)
      for (int64_t c = block.feature; c < block.feature_end; c++) {
        const int64_t of = batch.split[row] * features + c, i = (row * features + c) * length;
        map_run<DY, PAST>(dy + i, x + i, y + i, length, everywhere<T>(map.mean[of]),
                          everywhere<T>(map.slope[of]), everywhere<T>(map.offset[of]),
                          everywhere<T>(map.scale[of]));
      }
  }
#ifdef X86
  // What went past the cache is there before what follows.
  if (PAST) _mm_sfence();
#endif
}

// Writes the map of x, and of dy if DY, to y.
template <bool DY, class T>
void apply(const Batch& batch, const Map<Scalar<T>>& map, const T* dy, const T* x, T* y) {
  const int64_t run = (batch.last ? batch.features : batch.length) * sizeof(T);
  const bool large = batch.elements() * int64_t(sizeof(T)) >= LARGE;
  const bool aligned = (run | reinterpret_cast<intptr_t>(y)) % 32 == 0;
  if (!batch.elements()) return;
  parallel(batch, [&](int64_t share) {
    if (large && aligned)
      map_share<DY, true>(batch, map, dy, x, y, share);
    else
      map_share<DY, false>(batch, map, dy, x, y, share);
  });
}
