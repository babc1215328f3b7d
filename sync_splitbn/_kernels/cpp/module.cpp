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

// Calls body without Python's lock.
template <class Body>
PyObject* unlocked(const Body& body) {
  bool enough = true;
  Py_BEGIN_ALLOW_THREADS
  try {
    body();
  } catch (const std::exception&) {
    enough = false;
  }
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* moments(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t x, packed;
  if (!PyArg_ParseTuple(args, "CO&nn", &type, read_batch, &batch, &x, &packed)) return nullptr;
  return unlocked([&] {
    of_type(type, [&](auto element) {
      using T = decltype(element);
      const int64_t size = 2 * batch.features;
      const std::vector<double> sums =
          add_up<false, T>(batch, pointer<T>(x), pointer<T>(x), nullptr);
      for (int64_t split = 0; split < batch.splits; split++) {
        double* row = pointer<double>(packed) + split * (size + 1);
        std::copy_n(sums.data() + split * size, size, row);
        const auto rows = std::count(batch.split.begin(), batch.split.end(), split);
        row[size] = rows * batch.length;
      }
    });
  });
}

PyObject* normalize(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t x, y, mean, var;
  std::vector<int64_t> weights, biases;
  double eps;
  if (!PyArg_ParseTuple(args, "CO&nnnnO&O&d", &type, read_batch, &batch, &x, &y, &mean, &var,
                        read_addresses, &weights, read_addresses, &biases, &eps))
    return nullptr;
  return unlocked([&] {
    of_type(type, [&](auto element) {
      using T = decltype(element);
      using A = Scalar<T>;
      Map<A> map(batch.splits * batch.features);
      for (int64_t i = 0; i < batch.splits * batch.features; i++) {
        const int64_t split = i / batch.features, c = i % batch.features;
        const double exact = pointer<double>(mean)[i], square = pointer<double>(var)[i] + eps;
        const double weight = weights.empty() ? 1 : pointer<A>(weights[split])[c];
        const double bias = biases.empty() ? 0 : pointer<A>(biases[split])[c];
        map.mean[i] = exact;
        map.slope[i] = weight / std::sqrt(square);
        map.offset[i] = bias + (map.mean[i] - exact) * map.slope[i];
      }
      apply<false>(batch, map, pointer<T>(x), pointer<T>(x), pointer<T>(y));
    });
  });
}

PyObject* grad_sums(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t dy, x, mean, result;
  if (!PyArg_ParseTuple(args, "CO&nnnn", &type, read_batch, &batch, &dy, &x, &mean, &result))
    return nullptr;
  return unlocked([&] {
    of_type(type, [&](auto element) {
      using T = decltype(element);
      const int64_t features = batch.features;
      const double* exact = pointer<double>(mean);
      const std::vector<Scalar<T>> near(exact, exact + batch.splits * features);
      const std::vector<double> sums =
          add_up<true>(batch, pointer<T>(dy), pointer<T>(x), near.data());
      for (int64_t i = 0; i < batch.splits * features; i++) {
        const int64_t plain = i + i / features * features, product = plain + features;
        Scalar<T>* to = pointer<Scalar<T>>(result);
        to[plain] = sums[plain];
        to[product] = sums[product] + (near[i] - exact[i]) * sums[plain];
      }
    });
  });
}

PyObject* grad_input(PyObject*, PyObject* args) {
  int type;
  Batch batch;
  Py_ssize_t dy, x, dx, mean, var, packed, sums;
  std::vector<int64_t> weights;
  double eps;
  if (!PyArg_ParseTuple(args, "CO&nnnnnnnO&d", &type, read_batch, &batch, &dy, &x, &dx, &mean,
                        &var, &packed, &sums, read_addresses, &weights, &eps))
    return nullptr;
  return unlocked([&] {
    of_type(type, [&](auto element) {
      using T = decltype(element);
      using A = Scalar<T>;
      const int64_t features = batch.features;
      Map<A> map(batch.splits * features);
      for (int64_t i = 0; i < batch.splits * features; i++) {
        const int64_t split = i / features, c = i % features;
        const double exact = pointer<double>(mean)[i], square = pointer<double>(var)[i] + eps;
        const double count = pointer<double>(packed)[(split + 1) * (2 * features + 1) - 1];
        const A* sum = pointer<A>(sums) + 2 * features * split + c;
        const double weight = weights.empty() ? 1 : pointer<A>(weights[split])[c];
        const double scale = weight / std::sqrt(square), n = std::max(count, 1.0);
        const double slope = -scale / square * (sum[features] / n);
        map.mean[i] = exact;
        map.slope[i] = slope;
        map.offset[i] = (map.mean[i] - exact) * slope - scale * (sum[0] / n);
        map.scale[i] = scale;
      }
      apply<true>(batch, map, pointer<T>(dy), pointer<T>(x), pointer<T>(dx));
    });
  });
}

PyMethodDef methods[] = {
    {"moments", moments, METH_VARARGS, nullptr},
    {"normalize", normalize, METH_VARARGS, nullptr},
    {"grad_sums", grad_sums, METH_VARARGS, nullptr},
    {"grad_input", grad_input, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
