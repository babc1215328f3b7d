// Tensors of Python: every one is checked here before its address is taken.

#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <vector>

namespace {

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

// What DLPack 1 tells of a tensor, and the functions by which torch tells it; see dlpack.h in
// torch's include/ATen. Asking Python for the same attributes takes several times as long.
struct Description {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major_version, minor_version;
  const Exchange* older;
  void* of_managed_tensors[3];
  int (*describe)(void*, Description*);
  void* current_stream;
};
constexpr int32_t CPU = 1;
const Exchange* exchange;

// Returns torch's functions, or throws.
const Exchange* find_exchange() {
  const Owned torch(PyImport_ImportModule("torch"));
  const Owned tensor(PyObject_GetAttrString(torch.object, "Tensor"));
  const Owned capsule(PyObject_GetAttrString(tensor.object, "__dlpack_c_exchange_api__"));
  const void* newest = PyCapsule_GetPointer(capsule.object, "dlpack_exchange_api");
  const Exchange* found = static_cast<const Exchange*>(newest);
  while (found && found->major_version != 1) found = found->older;
  require(found && found->describe, PyExc_ImportError, "torch must speak DLPack 1");
  return found;
}

// Types of elements, and their codes and bits in DLPack.
enum Type { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT64, TYPES };
constexpr struct {
  uint8_t code, bits;
  const char* name;
} SPELLED[TYPES] = {{2, 32, "torch.float32"},
                    {2, 64, "torch.float64"},
                    {4, 16, "torch.bfloat16"},
                    {2, 16, "torch.float16"},
                    {0, 64, "torch.int64"}};

// The methods that tensors and storages are asked for what DLPack does not tell.
struct {
  PyObject *storage_offset, *untyped_storage, *nbytes;
} names;

int64_t call(PyObject* of, PyObject* name) {
  return Owned(PyObject_CallMethodObjArgs(of, name, nullptr)).integer();
}

using Integers = std::vector<int64_t>;

Integers integers(PyObject* sequence) {
  const Py_ssize_t size = PySequence_Size(sequence);
  require(size >= 0, PyExc_TypeError, "sizes must be a sequence");
  Integers values(size);
  for (Py_ssize_t i = 0; i < size; i++)
    values[i] = Owned(PySequence_GetItem(sequence, i)).integer();
  return values;
}

// What is known of a strided tensor on the CPU. Its shape and strides are in the Python object.
struct Tensor {
  PyObject* object;
  const char* name;
  Type type;
  void* address;
  int64_t dims;
  const int64_t *shape, *strides;

  Tensor(PyObject* tensor, const char* name) : object(tensor), name(name) {
    const Owned storage(PyObject_CallMethodObjArgs(tensor, names.untyped_storage, nullptr));
    const int64_t bytes = call(storage.object, names.nbytes);
    Description found;
    const bool is_described = exchange->describe(tensor, &found) == 0;
    // Of freed memory torch describes nothing, and says so in words of its own.
    if (!is_described && bytes == 0) PyErr_Clear();
    require(is_described, PyExc_RuntimeError, "%s must have storage for its elements, got none",
            name);
    require(found.device_type == CPU, PyExc_RuntimeError,
            "%s must be on the CPU, got a tensor elsewhere; move it by .to()", name);
    type = Type(std::find_if(SPELLED, SPELLED + TYPES, [&](const auto& each) {
             return each.code == found.type_code && each.bits == found.type_bits;
           }) - SPELLED);
    require(type < TYPES, PyExc_TypeError, "%s must be of a type with loops, got another", name);
    dims = found.dims, shape = found.shape, strides = found.strides;
    address = static_cast<char*>(found.data) + found.byte_offset;
    const int64_t end = call(tensor, names.storage_offset) + elements();
    require(bytes >= end * SPELLED[type].bits / 8, PyExc_RuntimeError,
            "%s must have storage for its elements, got %lld bytes; it was freed or resized", name,
            (long long)bytes);
    require(address || !elements(), PyExc_RuntimeError, "%s must have an address, got none", name);
  }

  int64_t elements() const {
    int64_t product = 1;
    for (int64_t dim = 0; dim < dims; dim++) product *= shape[dim];
    return product;
  }

  // Whether elements follow each other, with the channels of [N, C, ...] last if so asked.
  bool is_dense(bool channels_last) const {
    int64_t step = 1;
    const auto next = [&](int64_t dim) {
      const bool follows = shape[dim] == 1 || strides[dim] == step;
      step *= shape[dim];
      return follows;
    };
    bool dense = !channels_last || next(1);
    for (int64_t dim = dims; dim-- > 0;)
      if (!channels_last || dim != 1) dense &= next(dim);
    return dense || !elements();
  }

  // Raises unless it is contiguous, of this type and shape.
  void check(Type expected, std::initializer_list<int64_t> sizes) const {
    require(type == expected && std::equal(shape, shape + dims, sizes.begin(), sizes.end()) &&
                is_dense(false),
            PyExc_RuntimeError,
            "%s must be contiguous, of %s and of the shape that follows from the input, got %R",
            name, SPELLED[expected].name, Owned(PyObject_GetAttrString(object, "shape")).object);
  }

  template <class T>
  T* pointer() const {
    return static_cast<T*>(address);
  }
};

// Returns the addresses of such tensors, one a split, of a list that may be empty.
std::vector<void*> addresses(PyObject* list, const char* name, Type type,
                             std::initializer_list<int64_t> sizes, int64_t splits) {
  const int64_t count = PyList_Size(list);
  require(count == splits || count == 0, PyExc_RuntimeError, "%s must be of %lld splits, got %lld",
          name, (long long)splits, (long long)count);
  std::vector<void*> found(count);
  for (int64_t i = 0; i < count; i++) {
    const Tensor tensor(PyList_GetItem(list, i), name);
    tensor.check(type, sizes);
    found[i] = tensor.address;
  }
  return found;
}

}  // namespace
