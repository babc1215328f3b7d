// The four kernels as cpu.py calls them, with tensors given by their addresses.
//
// [S, C] is what S splits have for C features: mean and var float64, weights and biases an address
// [C] for each split, in the type that elements are computed with, as the sums of dy are.

#include "loops.h"

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cmath>
#include <exception>

namespace {

// Calls body(T()) for the type of elements that Python names by a letter.
template <class Body>
void of_type(int letter, const Body& body) {
  switch (letter) {
    case 'f':
      return body(float());
    case 'd':
      return body(double());
    case 'b':
      return body(Bfloat16());
    case 'h':
      return body(Half());
  }
}

template <class T>
T* pointer(Py_ssize_t address) {
  return reinterpret_cast<T*>(address);
}

int refuse(PyObject* error, const char* message) {
  PyErr_SetString(error, message);
  return 0;
}

// Calls body() for its result; memory that there is not is no reason to end the process.
template <class Body>
int guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    PyErr_NoMemory();
    return 0;
  }
}

// Reads numbers from a tuple.
int read_numbers(PyObject* given, std::vector<int64_t>& numbers) {
  if (!PyTuple_Check(given)) return refuse(PyExc_TypeError, "numbers must be in a tuple");
  for (Py_ssize_t i = 0; i < PyTuple_Size(given); i++)
    numbers.push_back(PyLong_AsSsize_t(PyTuple_GetItem(given, i)));
  return !PyErr_Occurred();
}

// Fills in the split of each row from S sizes.
int expand(const std::vector<int64_t>& sizes, Batch& batch) {
  for (size_t split = 0; split < sizes.size(); split++) {
    const int64_t rows = batch.split.size(), size = sizes[split];
    if (size < 0 || size > batch.rows - rows) break;
    batch.split.resize(rows + size, split);
  }
  return int64_t(batch.split.size()) == batch.rows;
}

// Reads (sizes or the address of an index, S, N, C, L, whether features are innermost, threads).
int read_batch(PyObject* given, void* into) {
  Batch& batch = *static_cast<Batch*>(into);
  PyObject* splits;
  int last;
  if (!PyArg_ParseTuple(given, "OLLLLpL", &splits, &batch.splits, &batch.rows, &batch.features,
                        &batch.length, &last, &batch.threads))
    return 0;
  batch.last = last;
  return guarded([&] {
    if (PyLong_Check(splits)) {
      const int64_t* index = pointer<int64_t>(PyLong_AsSsize_t(splits));
      batch.split.assign(index, index + batch.rows);
    } else {
      std::vector<int64_t> sizes;
      if (!read_numbers(splits, sizes)) return 0;
      if (!expand(sizes, batch)) return refuse(PyExc_ValueError, "sizes must sum to the rows");
    }
    for (const int64_t split : batch.split)
      if (split < 0 || split >= batch.splits)
        return refuse(PyExc_ValueError, "index must hold splits");
    return 1;
  });
}

// Reads an address for each split, or None.
int read_addresses(PyObject* given, void* into) {
  auto& addresses = *static_cast<std::vector<int64_t>*>(into);
  return given == Py_None || guarded([&] { return read_numbers(given, addresses); });
}

// Calls body(T()) for the type of elements, without Python's lock.
template <class Body>
PyObject* unlocked(int type, const Body& body) {
  bool enough = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    of_type(type, body);
  } catch (const std::exception&) {
    enough = false;
  }
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// What the four kernels share of a layer: [S, C] mean and var, and the parameters.
struct Layer {
  Py_ssize_t mean, var;
  std::vector<int64_t> weights, biases;
  double eps;

  template <class A>
  double weight(int64_t split, int64_t feature) const {
    return weights.empty() ? 1 : pointer<A>(weights[split])[feature];
  }
  template <class A>
  double bias(int64_t split, int64_t feature) const {
    return biases.empty() ? 0 : pointer<A>(biases[split])[feature];
  }
};

template <class T>
void fill_moments(const Batch& batch, const T* x, double* packed) {
  const int64_t size = 2 * batch.features;
  const std::vector<double> sums = add_up<false, T>(batch, x, x, nullptr);
  for (int64_t split = 0; split < batch.splits; split++, packed += size + 1) {
    std::copy_n(sums.data() + split * size, size, packed);
    const auto rows = std::count(batch.split.begin(), batch.split.end(), split);
    packed[size] = rows * batch.length;
  }
}

template <class T>
void fill_output(const Batch& batch, const Layer& layer, const T* x, T* y) {
  using A = Scalar<T>;
  Map<A> map(batch.splits * batch.features * batch.fold());
  for (int64_t i = 0; i < batch.splits * batch.features; i++) {
    const int64_t split = i / batch.features, c = i % batch.features;
    const double mean = pointer<double>(layer.mean)[i], var = pointer<double>(layer.var)[i];
    // What the mean loses by its type goes to the offset.
    const A near = mean, slope = layer.weight<A>(split, c) / std::sqrt(var + layer.eps);
    const A offset = layer.bias<A>(split, c) + (near - mean) * slope;
    map.set(batch, split, c, {near, slope, offset, 0});
  }
  apply<false>(batch, map, x, x, y);
}

template <class T>
void fill_sums(const Batch& batch, const T* dy, const T* x, const double* mean, Scalar<T>* to) {
  const int64_t features = batch.features;
  const std::vector<Scalar<T>> near(mean, mean + batch.splits * features);
  const std::vector<double> sums = add_up<true>(batch, dy, x, near.data());
  for (int64_t i = 0; i < batch.splits * features; i++) {
    const int64_t plain = i + i / features * features, product = plain + features;
    to[plain] = sums[plain];
    to[product] = sums[product] + (near[i] - mean[i]) * sums[plain];
  }
}

template <class T>
void fill_gradient(const Batch& batch, const Layer& layer, const T* dy, const T* x,
                   const double* packed, const Scalar<T>* sums, T* dx) {
  using A = Scalar<T>;
  const int64_t features = batch.features;
  Map<A> map(batch.splits * features * batch.fold());
  for (int64_t i = 0; i < batch.splits * features; i++) {
    const int64_t split = i / features, c = i % features;
    const double mean = pointer<double>(layer.mean)[i], var = pointer<double>(layer.var)[i];
    const double count = std::max(packed[(split + 1) * (2 * features + 1) - 1], 1.0);
    const A* sum = sums + 2 * features * split + c;
    const double scale = layer.weight<A>(split, c) / std::sqrt(var + layer.eps);
    const double slope = -scale / (var + layer.eps) * (sum[features] / count);
    const A near = mean, offset = (near - mean) * slope - scale * (sum[0] / count);
    map.set(batch, split, c, {near, A(slope), offset, A(scale)});
  }
  apply<true>(batch, map, dy, x, dx);
}

PyObject* moments(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t x, packed;
  if (!PyArg_ParseTuple(args, "CO&nn", &type, read_batch, &batch, &x, &packed)) return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    fill_moments(batch, pointer<T>(x), pointer<double>(packed));
  });
}

PyObject* normalize(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Layer layer;
  Py_ssize_t x, y;
  if (!PyArg_ParseTuple(args, "CO&nnnnO&O&d", &type, read_batch, &batch, &x, &y, &layer.mean,
                        &layer.var, read_addresses, &layer.weights, read_addresses, &layer.biases,
                        &layer.eps))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    fill_output(batch, layer, pointer<T>(x), pointer<T>(y));
  });
}

PyObject* grad_sums(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t dy, x, mean, sums;
  if (!PyArg_ParseTuple(args, "CO&nnnn", &type, read_batch, &batch, &dy, &x, &mean, &sums))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    fill_sums(batch, pointer<T>(dy), pointer<T>(x), pointer<double>(mean),
              pointer<Scalar<T>>(sums));
  });
}

PyObject* grad_input(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Layer layer;
  Py_ssize_t dy, x, dx, packed, sums;
  if (!PyArg_ParseTuple(args, "CO&nnnnnnnO&d", &type, read_batch, &batch, &dy, &x, &dx,
                        &layer.mean, &layer.var, &packed, &sums, read_addresses, &layer.weights,
                        &layer.eps))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    fill_gradient(batch, layer, pointer<T>(dy), pointer<T>(x), pointer<double>(packed),
                  pointer<Scalar<T>>(sums), pointer<T>(dx));
  });
}

// moments and normalize, with the statistics between them.
PyObject* alone(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Layer layer;
  Py_ssize_t x, y, packed;
  if (!PyArg_ParseTuple(args, "CO&nnnnnO&O&d", &type, read_batch, &batch, &x, &y, &packed,
                        &layer.mean, &layer.var, read_addresses, &layer.weights, read_addresses,
                        &layer.biases, &layer.eps))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    const int64_t features = batch.features;
    fill_moments(batch, pointer<T>(x), pointer<double>(packed));
    for (int64_t i = 0; i < batch.splits * features; i++) {
      const double* row = pointer<double>(packed) + i / features * (2 * features + 1);
      const double count = std::max(row[2 * features], 1.0), mean = row[i % features] / count;
      pointer<double>(layer.mean)[i] = mean;
      const double square = row[features + i % features] / count - mean * mean;
      // A NaN stays one.
      pointer<double>(layer.var)[i] = square < 0 ? 0 : square;
    }
    fill_output(batch, layer, pointer<T>(x), pointer<T>(y));
  });
}

// grad_sums and grad_input, and the gradients of weights and biases, [2, S, C].
PyObject* grad_alone(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Layer layer;
  Py_ssize_t dy, x, dx, packed, grads;
  if (!PyArg_ParseTuple(args, "CO&nnnnnnnO&d", &type, read_batch, &batch, &dy, &x, &dx,
                        &layer.mean, &layer.var, &packed, &grads, read_addresses, &layer.weights,
                        &layer.eps))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using T = decltype(element);
    const int64_t features = batch.features, size = batch.splits * features;
    std::vector<Scalar<T>> sums(2 * size);
    fill_sums(batch, pointer<T>(dy), pointer<T>(x), pointer<double>(layer.mean), sums.data());
    Scalar<T>* to = pointer<Scalar<T>>(grads);
    for (int64_t i = 0; i < size; i++) {
      const int64_t plain = i + i / features * features;
      to[i] = sums[plain + features] / std::sqrt(pointer<double>(layer.var)[i] + layer.eps);
      to[size + i] = sums[plain];
    }
    fill_gradient(batch, layer, pointer<T>(dy), pointer<T>(x), pointer<double>(packed),
                  sums.data(), pointer<T>(dx));
  });
}

// Moves running statistics, [C] each, by those of a batch, where a split has any.
PyObject* follow(PyObject*, PyObject* args) {
  int type;
  int64_t features;
  Py_ssize_t packed, mean, var;
  std::vector<int64_t> means, vars, trackers;
  double momentum;
  if (!PyArg_ParseTuple(args, "CLnnnO&O&O&d", &type, &features, &packed, &mean, &var,
                        read_addresses, &means, read_addresses, &vars, read_addresses, &trackers,
                        &momentum))
    return nullptr;
  return unlocked(type, [&](auto element) {
    using A = Scalar<decltype(element)>;
    for (size_t split = 0; split < means.size(); split++) {
      const int64_t first = split * features;
      const double count = pointer<double>(packed)[(split + 1) * (2 * features + 1) - 1];
      A *of_mean = pointer<A>(means[split]), *of_var = pointer<A>(vars[split]);
      if (count > 0) *pointer<int64_t>(trackers[split]) += 1;
      for (int64_t c = 0; c < features && count > 0; c++)
        of_mean[c] += momentum * (pointer<double>(mean)[first + c] - of_mean[c]);
      // A single element has no variance.
      for (int64_t c = 0; c < features && count > 1; c++) {
        const double unbiased = pointer<double>(var)[first + c] * (count / (count - 1));
        of_var[c] += momentum * (unbiased - of_var[c]);
      }
    }
  });
}

PyMethodDef methods[] = {
    {"moments", moments, METH_VARARGS, nullptr},
    {"normalize", normalize, METH_VARARGS, nullptr},
    {"grad_sums", grad_sums, METH_VARARGS, nullptr},
    {"grad_input", grad_input, METH_VARARGS, nullptr},
    {"alone", alone, METH_VARARGS, nullptr},
    {"grad_alone", grad_alone, METH_VARARGS, nullptr},
    {"follow", follow, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
