// The kernels as cpu.py calls them.
//
// Moments are [S, 2C + 1] float64, each row mean, variance and count; parameters are a tensor [C]
// for each split, in the type that elements are computed with, as the sums of dy are.

#include "tensor.h"

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "loops.h"

namespace {

struct OwnedBatch : Batch {
  Type type;
  Integers split_of_row;

  // From x, an index or the sizes of contiguous splits, and a tensor with a row for each split.
  OwnedBatch(const Tensor& x, PyObject* index, PyObject* sizes, const Tensor& by_split,
             int64_t num_threads)
      : Batch(), type(x.type) {
    require(type != INT64 && x.dims >= 2, PyExc_TypeError, "x must be floating [N, C, ...]");
    require(by_split.dims == 2, PyExc_RuntimeError, "%s must be a matrix", by_split.name);
    rows = x.shape[0], features = x.shape[1], splits = by_split.shape[0], threads = num_threads;
    length = 1;
    for (int64_t dim = 2; dim < x.dims; dim++) length *= x.shape[dim];
    channels_last = features > 1 && x.is_dense(true);
    require(channels_last || x.is_dense(false), PyExc_RuntimeError, "x must be dense");
    require((index == Py_None) != (sizes == Py_None), PyExc_ValueError,
            "either index or sizes must be given");
    if (index == Py_None)
      expand(integers(sizes));
    else {
      const Tensor given(index, "index");
      given.check(INT64, {rows});
      // A copy: another thread may change the index after it was checked.
      split_of_row.assign(given.pointer<int64_t>(), given.pointer<int64_t>() + rows);
    }
    for (const int64_t split : split_of_row)
      require(split >= 0 && split < splits, PyExc_ValueError,
              "index must hold splits from 0 to num_splits - 1");
    split = split_of_row.data();
    shares = std::clamp(x.elements() / ELEMENTS_PER_THREAD, int64_t(1), threads);
    positions_per_row = channels_last ? std::max(LONG_ROW / features, int64_t(1)) : 1;
  }

  void expand(const Integers& sizes) {
    for (size_t i = 0; i < sizes.size(); i++) {
      const int64_t left = rows - int64_t(split_of_row.size());
      require(sizes[i] >= 0 && sizes[i] <= left, PyExc_ValueError, "sizes must sum to the rows");
      split_of_row.resize(split_of_row.size() + sizes[i], i);
    }
    require(int64_t(split_of_row.size()) == rows, PyExc_ValueError, "sizes must sum to the rows");
  }

  Type accumulation_type() const { return type == FLOAT64 ? FLOAT64 : FLOAT32; }

  // Returns the tensor of a batch like x, in the same layout.
  Tensor like(const Tensor& x, PyObject* tensor, const char* name) const {
    Tensor found(tensor, name);
    require(found.type == type && std::equal(x.shape, x.shape + x.dims, found.shape,
                                             found.shape + found.dims) &&
                found.is_dense(channels_last),
            PyExc_RuntimeError, "%s must have the type, shape and layout of x", name);
    return found;
  }
};

// Calls body(T()) for the type of elements, without the GIL.
template <class Body>
void run(Type type, const Body& body) {
  bool has_memory = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    if (type == FLOAT32) body(float());
    if (type == FLOAT64) body(double());
    if (type == BFLOAT16) body(Bfloat16());
    if (type == FLOAT16) body(Half());
  } catch (const std::bad_alloc&) {
    has_memory = false;
  }
  Py_END_ALLOW_THREADS
  if (!has_memory) throw std::bad_alloc();
}

// Calls body() and returns None, or raises what it threw.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    body();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception&) {
    return PyErr_NoMemory();
  }
  Py_RETURN_NONE;
}

// Moments and parameters of a layer, by split and feature.
template <class T>
struct Layer {
  using A = Scalar<T>;
  int64_t features;
  const double* moments;
  const std::vector<void*>&weights, &biases;
  double eps;

  const double* row(int64_t split) const { return moments + split * (2 * features + 1); }
  double mean(int64_t split, int64_t c) const { return row(split)[c]; }
  double invstd(int64_t split, int64_t c) const {
    return 1 / std::sqrt(row(split)[features + c] + eps);
  }
  double count(int64_t split) const { return std::max(row(split)[2 * features], 1.0); }
  double weight(int64_t split, int64_t c) const {
    return weights.empty() ? 1 : static_cast<const A*>(weights[split])[c];
  }
  double bias(int64_t split, int64_t c) const {
    return biases.empty() ? 0 : static_cast<const A*>(biases[split])[c];
  }
};

// Returns the totals of sum_batch, of which the first [S, 2C] are the result.
template <bool GRAD, class T>
std::vector<double> sum_all(const Batch& batch, const T* dy, const T* x, const Scalar<T>* mean) {
  std::vector<double> totals(batch.shares * batch.splits * 2 * batch.features);
  const int64_t vectors = batch.channels_last ? 0 : 3 * batch.shares * batch.features;
  std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(VECTOR_BYTES, VECTOR_BYTES * (vectors + 1)), &std::free);
  if (!memory) throw std::bad_alloc();
  sum_batch<GRAD>(batch, dy, x, mean, totals.data(), memory.get());
  return totals;
}

// Writes to y or dx, with the coefficients that of(split, feature) returns as four numbers.
template <bool GRAD, class T, class Of>
void map_all(const Batch& batch, const T* dy, const T* x, T* y, const Of& of) {
  using A = Scalar<T>;
  const int64_t features = batch.features, repeats = batch.positions_per_row;
  const int64_t size = batch.splits * repeats * features;
  std::vector<A> numbers(4 * size + 1);
  A* const all = numbers.data();
  const Coefficients<A> map{all, all + size, all + 2 * size, all + 3 * size};
  for (int64_t split = 0; split < batch.splits; split++)
    for (int64_t c = 0; c < features; c++) {
      const auto [mean, slope, offset, scale] = of(split, c);
      for (int64_t i = split * repeats; i < (split + 1) * repeats; i++) {
        const int64_t at = i * features + c;
        map.mean[at] = mean, map.slope[at] = slope, map.offset[at] = offset, map.scale[at] = scale;
      }
    }
  map_batch<GRAD>(batch, map, dy, x, y);
}

template <class A>
struct Line {
  A mean, slope, offset, scale;
};

template <class T>
void fill_sums(const Batch& batch, const T* x, const Scalar<T>* mean, double* out) {
  const auto totals = sum_all<false, T>(batch, x, x, mean);
  const int64_t size = 2 * batch.features;
  for (int64_t split = 0; split < batch.splits; split++, out += size + 1) {
    std::copy_n(totals.data() + split * size, size, out);
    out[size] = std::count(batch.split, batch.split + batch.rows, split) * batch.length;
  }
}

// Turns sums of x into moments, in place if they are one.
void fill_moments(int64_t splits, int64_t features, const double* sums, double* out) {
  const int64_t width = 2 * features + 1;
  for (int64_t split = 0; split < splits; split++, sums += width, out += width) {
    const double count = std::max(sums[2 * features], 1.0);
    for (int64_t c = 0; c < features; c++) {
      const double mean = sums[c] / count, var = sums[features + c] / count - mean * mean;
      out[c] = mean;
      // Not by max(): a NaN stays one.
      out[features + c] = var < 0 ? 0 : var;
    }
    out[2 * features] = sums[2 * features];
  }
}

// Moments of x itself; those of float64 about their mean, where no digit is lost.
template <class T>
void fill_local_moments(const Batch& batch, const T* x, double* moments) {
  const int64_t features = batch.features, width = 2 * features + 1;
  fill_sums<T>(batch, x, nullptr, moments);
  fill_moments(batch.splits, features, moments, moments);
  if constexpr (sizeof(T) == sizeof(double)) {
    std::vector<double> mean(batch.splits * features);
    for (size_t i = 0; i < mean.size(); i++)
      mean[i] = moments[i / features * width + i % features];
    fill_sums<T>(batch, x, mean.data(), moments);
    fill_moments(batch.splits, features, moments, moments);
    for (size_t i = 0; i < mean.size(); i++)
      moments[i / features * width + i % features] += mean[i];
  }
}

template <class T>
void fill_output(const Batch& batch, const Layer<T>& layer, const T* x, T* y) {
  using A = Scalar<T>;
  map_all<false>(batch, x, x, y, [&](int64_t split, int64_t c) {
    // What the mean loses by its type goes to the offset.
    const double mean = layer.mean(split, c);
    const A high = mean, slope = layer.weight(split, c) * layer.invstd(split, c);
    return Line<A>{high, slope, A(layer.bias(split, c) + (high - mean) * slope), 0};
  });
}

template <class T>
void fill_grad_sums(const Batch& batch, const Layer<T>& layer, const T* dy, const T* x,
                    Scalar<T>* out) {
  const int64_t features = batch.features;
  std::vector<Scalar<T>> high(batch.splits * features);
  for (size_t i = 0; i < high.size(); i++) high[i] = layer.mean(i / features, i % features);
  const auto totals = sum_all<true>(batch, dy, x, high.data());
  for (int64_t split = 0; split < batch.splits; split++)
    for (int64_t c = 0; c < features; c++) {
      const int64_t i = 2 * split * features + c;
      const double rest = high[split * features + c] - layer.mean(split, c);
      out[i] = totals[i];
      out[i + features] = (totals[i + features] + rest * totals[i]) * layer.invstd(split, c);
    }
}

template <class T>
void fill_gradient(const Batch& batch, const Layer<T>& layer, const T* dy, const T* x,
                   const Scalar<T>* sums, T* dx) {
  using A = Scalar<T>;
  map_all<true>(batch, dy, x, dx, [&](int64_t split, int64_t c) {
    const A* sum = sums + 2 * batch.features * split + c;
    const double mean = layer.mean(split, c), invstd = layer.invstd(split, c);
    const double count = layer.count(split), scale = layer.weight(split, c) * invstd;
    const double slope = -scale * invstd * (sum[batch.features] / count);
    const A high = mean;
    const double offset = (high - mean) * slope - scale * (sum[0] / count);
    return Line<A>{high, A(slope), A(offset), A(scale)};
  });
}

PyObject* sums(PyObject*, PyObject* args) {
  PyObject *x_, *index, *sizes, *out;
  long long threads;
  if (!PyArg_ParseTuple(args, "OOOOL", &x_, &index, &sizes, &out, &threads)) return nullptr;
  return guarded([&] {
    const Tensor x(x_, "x"), sums(out, "sums");
    const OwnedBatch batch(x, index, sizes, sums, threads);
    sums.check(FLOAT64, {batch.splits, 2 * batch.features + 1});
    run(batch.type, [&](auto element) {
      using T = decltype(element);
      fill_sums<T>(batch, x.pointer<T>(), nullptr, sums.pointer<double>());
    });
  });
}

PyObject* moments(PyObject*, PyObject* args) {
  PyObject *sums_, *out;
  if (!PyArg_ParseTuple(args, "OO", &sums_, &out)) return nullptr;
  return guarded([&] {
    const Tensor sums(sums_, "sums"), moments(out, "moments");
    require(sums.dims == 2, PyExc_RuntimeError, "sums must be [S, 2C + 1]");
    for (const Tensor* each : {&sums, &moments})
      each->check(FLOAT64, {sums.shape[0], sums.shape[1]});
    fill_moments(sums.shape[0], sums.shape[1] / 2, sums.pointer<double>(),
                 moments.pointer<double>());
  });
}

template <bool LOCAL>
PyObject* normalize(PyObject*, PyObject* args) {
  PyObject *x_, *index, *sizes, *moments_, *weights_, *biases_, *out;
  double eps;
  long long threads;
  if (!PyArg_ParseTuple(args, "OOOOOOdOL", &x_, &index, &sizes, &moments_, &weights_, &biases_,
                        &eps, &out, &threads))
    return nullptr;
  return guarded([&] {
    const Tensor x(x_, "x"), moments(moments_, "moments");
    const OwnedBatch batch(x, index, sizes, moments, threads);
    const int64_t splits = batch.splits, features = batch.features;
    moments.check(FLOAT64, {splits, 2 * features + 1});
    const Tensor y = batch.like(x, out, "y");
    const Type wide = batch.accumulation_type();
    const auto weights = addresses(weights_, "weight", wide, {features}, splits);
    const auto biases = addresses(biases_, "bias", wide, {features}, splits);
    run(batch.type, [&](auto element) {
      using T = decltype(element);
      const Layer<T> layer{features, moments.pointer<double>(), weights, biases, eps};
      if (LOCAL) fill_local_moments(batch, x.pointer<T>(), moments.pointer<double>());
      fill_output(batch, layer, x.pointer<T>(), y.pointer<T>());
    });
  });
}

// Which of the two ways of the gradient: sums, the gradient of x by sums, or both.
enum Gradient { SUMS, INPUT, BOTH };

template <Gradient WANTED>
PyObject* gradient(PyObject*, PyObject* args) {
  PyObject *dy_, *x_, *index, *sizes, *moments_, *weights_, *sums_, *out;
  double eps;
  long long threads;
  if (!PyArg_ParseTuple(args, "OOOOOOdOOL", &dy_, &x_, &index, &sizes, &moments_, &weights_, &eps,
                        &sums_, &out, &threads))
    return nullptr;
  return guarded([&] {
    const Tensor x(x_, "x"), moments(moments_, "moments"), sums(sums_, "sums");
    const OwnedBatch batch(x, index, sizes, moments, threads);
    const int64_t splits = batch.splits, features = batch.features;
    const Type wide = batch.accumulation_type();
    moments.check(FLOAT64, {splits, 2 * features + 1});
    sums.check(wide, {splits, 2 * features});
    const Tensor dy = batch.like(x, dy_, "dy");
    // For SUMS there is no dx, and none is written.
    const Tensor dx = batch.like(x, WANTED == SUMS ? dy_ : out, "dx");
    const auto weights = addresses(weights_, "weight", wide, {features}, splits);
    const std::vector<void*> no_biases;
    run(batch.type, [&](auto element) {
      using T = decltype(element);
      const Layer<T> layer{features, moments.pointer<double>(), weights, no_biases, eps};
      Scalar<T>* numbers = sums.pointer<Scalar<T>>();
      if (WANTED != INPUT) fill_grad_sums(batch, layer, dy.pointer<T>(), x.pointer<T>(), numbers);
      if (WANTED != SUMS)
        fill_gradient(batch, layer, dy.pointer<T>(), x.pointer<T>(), numbers, dx.pointer<T>());
    });
  });
}

PyObject* update_running_stats(PyObject*, PyObject* args) {
  PyObject *means_, *vars_, *counters_, *moments_;
  double momentum;
  int is_average;
  if (!PyArg_ParseTuple(args, "OOOdpO", &means_, &vars_, &counters_, &momentum, &is_average,
                        &moments_))
    return nullptr;
  return guarded([&] {
    const Tensor moments(moments_, "moments");
    require(moments.dims == 2, PyExc_RuntimeError, "moments must be [S, 2C + 1]");
    const int64_t splits = moments.shape[0], width = moments.shape[1], features = width / 2;
    moments.check(FLOAT64, {splits, width});
    require(PyList_Size(means_) == splits && PyList_Size(vars_) == splits, PyExc_RuntimeError,
            "running_mean and running_var must be of %lld splits", (long long)splits);
    if (!splits) return;
    const Type type = Tensor(PyList_GetItem(means_, 0), "running_mean").type;
    require(type == FLOAT32 || type == FLOAT64, PyExc_TypeError,
            "running_mean must be float32 or float64");
    const auto means = addresses(means_, "running_mean", type, {features}, splits);
    const auto vars = addresses(vars_, "running_var", type, {features}, splits);
    const auto counters = addresses(counters_, "num_batches_tracked", INT64, {}, splits);
    run(type, [&](auto element) {
      using A = Scalar<decltype(element)>;
      const double* row = moments.pointer<double>();
      for (int64_t split = 0; split < splits; split++, row += width) {
        const double count = row[2 * features];
        if (!(count > 0)) continue;
        double step = momentum;
        if (!counters.empty()) {
          const int64_t batches = ++*static_cast<int64_t*>(counters[split]);
          if (is_average) step = 1.0 / batches;
        }
        A *mean = static_cast<A*>(means[split]), *var = static_cast<A*>(vars[split]);
        // Not by the difference of both: infinity would become NaN.
        for (int64_t c = 0; c < features; c++) mean[c] = (1 - step) * mean[c] + step * row[c];
        // A single element has no variance.
        for (int64_t c = 0; c < features && count > 1; c++)
          var[c] = (1 - step) * var[c] + step * (row[features + c] * (count / (count - 1)));
      }
    });
  });
}

// Counted up with every change of the arguments; cpu.py refuses a module with another one.
constexpr int CONTRACT = 2;

PyMethodDef methods[] = {
    {"sums", sums, METH_VARARGS, nullptr},
    {"moments", moments, METH_VARARGS, nullptr},
    {"normalize", normalize<false>, METH_VARARGS, nullptr},
    {"normalize_batch", normalize<true>, METH_VARARGS, nullptr},
    {"grad_sums", gradient<SUMS>, METH_VARARGS, nullptr},
    {"grad_input", gradient<INPUT>, METH_VARARGS, nullptr},
    {"grad_batch", gradient<BOTH>, METH_VARARGS, nullptr},
    {"update_running_stats", update_running_stats, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  try {
    exchange = find_exchange();
  } catch (const PythonError&) {
    return nullptr;
  }
  names = {PyUnicode_InternFromString("storage_offset"),
           PyUnicode_InternFromString("untyped_storage"), PyUnicode_InternFromString("nbytes")};
  PyObject* created = PyModule_Create(&module);
  if (created) PyModule_AddIntConstant(created, "contract", CONTRACT);
  return created;
}
