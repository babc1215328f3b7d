// Tensors of Python: every one is checked here before its address is taken.

#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

namespace {

// The types of torch, in this order, and the names of what tensors are asked.
enum Type { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT64, TYPES };
PyObject* types[TYPES];
constexpr int64_t ITEM_BYTES[TYPES] = {4, 8, 2, 2, 8};

enum Name { IS_CPU, DTYPE, SHAPE, STRIDE, STORAGE_OFFSET, UNTYPED_STORAGE, NBYTES, DATA_PTR, NAMES };
PyObject* names[NAMES];
constexpr const char* SPELLED[NAMES] = {"is_cpu",         "dtype",           "shape",  "stride",
                                        "storage_offset", "untyped_storage", "nbytes", "data_ptr"};

// A Python exception is set.
struct PythonError : std::exception {};

template <class... Arguments>
void require(bool holds, PyObject* error, const char* format, Arguments... arguments) {
  if (holds) return;
  if (!PyErr_Occurred()) PyErr_Format(error, format, arguments...);
  throw PythonError();
}

// A reference that is given back.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* object) : object(object) {
    if (!object) throw PythonError();
  }
  ~Owned() { Py_DECREF(object); }
  Owned(const Owned&) = delete;
  int64_t integer() const {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
  }
};

PyObject* attribute(PyObject* of, Name name) { return PyObject_GetAttr(of, names[name]); }
PyObject* call(PyObject* of, Name name) {
  return PyObject_CallMethodObjArgs(of, names[name], nullptr);
}

using Integers = std::vector<int64_t>;

// Of a tuple or a list.
Integers integers(PyObject* given) {
  const bool is_tuple = PyTuple_Check(given);
  Integers values(is_tuple ? PyTuple_Size(given) : PyList_Size(given));
  for (size_t i = 0; i < values.size(); i++) {
    values[i] = PyLong_AsLongLong(is_tuple ? PyTuple_GetItem(given, i) : PyList_GetItem(given, i));
    if (values[i] == -1 && PyErr_Occurred()) throw PythonError();
  }
  return values;
}

// What is known of a tensor on the CPU.
struct Tensor {
  Type type;
  int64_t address;
  Integers shape, strides;

  Tensor(PyObject* tensor, const char* name) {
    require(Owned(attribute(tensor, IS_CPU)).object == Py_True, PyExc_RuntimeError,
            "%s must be on the CPU, got a tensor elsewhere; move it by .to()", name);
    const Owned dtype(attribute(tensor, DTYPE));
    type = Type(std::find(types, types + TYPES, dtype.object) - types);
    require(type < TYPES, PyExc_TypeError, "%s must be of a type with loops, got %S", name,
            dtype.object);
    shape = integers(Owned(attribute(tensor, SHAPE)).object);
    strides = integers(Owned(call(tensor, STRIDE)).object);
    const int64_t end = Owned(call(tensor, STORAGE_OFFSET)).integer() + elements();
    const Owned storage(call(tensor, UNTYPED_STORAGE));
    const int64_t bytes = Owned(call(storage.object, NBYTES)).integer();
    require(bytes >= end * ITEM_BYTES[type], PyExc_RuntimeError,
            "%s must have storage for its elements, got %lld bytes; it was freed or resized", name,
            (long long)bytes);
    address = Owned(call(tensor, DATA_PTR)).integer();
    require(address || !elements(), PyExc_RuntimeError, "%s must have an address, got none", name);
  }

  int64_t elements() const {
    int64_t product = 1;
    for (const int64_t size : shape) product *= size;
    return product;
  }

  // Whether elements follow each other, with the channels of [N, C, ...] last if so asked.
  bool is_dense(bool channels_last) const {
    int64_t step = 1;
    const auto next = [&](size_t dim) {
      const bool follows = shape[dim] == 1 || strides[dim] == step;
      step *= shape[dim];
      return follows;
    };
    bool dense = !channels_last || next(1);
    for (size_t dim = shape.size(); dim-- > 0;)
      if (!channels_last || dim != 1) dense &= next(dim);
    return dense || !elements();
  }

  template <class T>
  T* pointer() const {
    return reinterpret_cast<T*>(address);
  }
};

// Returns a contiguous tensor of this type and shape.
Tensor checked(PyObject* tensor, const char* name, Type type, const Integers& shape) {
  Tensor found(tensor, name);
  require(found.type == type && found.shape == shape && found.is_dense(false), PyExc_RuntimeError,
          "%s must be contiguous, of %S and of the shape that follows from the input, got %S", name,
          types[type], Owned(attribute(tensor, SHAPE)).object);
  return found;
}

// Returns the addresses of such tensors, one a split, of a sequence or None.
Integers addresses(PyObject* tensors, const char* name, Type type, const Integers& shape,
                   int64_t splits) {
  Integers found;
  if (tensors == Py_None) return found;
  const Py_ssize_t size = PySequence_Size(tensors);
  require(size == splits, PyExc_RuntimeError, "%s must be of %lld splits, got %lld", name,
          (long long)splits, (long long)size);
  for (Py_ssize_t i = 0; i < size; i++)
    found.push_back(checked(Owned(PySequence_GetItem(tensors, i)).object, name, type, shape).address);
  return found;
}

}  // namespace
