// fastdecode._host.NgramIndex: int64 NumPy arrays in and out, the GIL released while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>

#include "core/check.h"
#include "host/ngram_index.h"

namespace py = pybind11;

using fastdecode::NgramIndex;

void bind_ngram_index(py::module_& m) {
  py::class_<NgramIndex>(m, "NgramIndex",
                         "Where each n-gram of a growing text occurred last.\n\n"
                         "One text per object. Not for use from several threads at once. ValueError unless\n"
                         "1 <= min_ngram <= max_ngram <= 64.")
      .def(py::init<int64_t, int64_t>(), py::arg("max_ngram") = 3, py::arg("min_ngram") = 1)
      .def(
          "extend",
          [](NgramIndex& self, const py::array& tokens) {
            // kind and size, not identity: NumPy has two types of 64-bit integers where long and long long are the same
            const py::dtype dtype = tokens.dtype();
            const bool int64 = dtype.kind() == 'i' && dtype.itemsize() == sizeof(int64_t) && dtype.byteorder() == '=';
            FD_CHECK_ARG(int64 && tokens.ndim() == 1,
                         "NgramIndex.extend: tokens: expected a contiguous int64 array [n], got ",
                         py::str(dtype).cast<std::string>(), " with ", tokens.ndim(), " dimensions");
            FD_CHECK_ARG(tokens.size() <= 1 || tokens.strides(0) == sizeof(int64_t),
                         "NgramIndex.extend: tokens: expected a contiguous int64 array [n], got a stride of ",
                         tokens.strides(0), " bytes");
            const std::span<const int64_t> span(static_cast<const int64_t*>(tokens.data()),
                                                static_cast<size_t>(tokens.size()));
            py::gil_scoped_release unlocked;
            self.extend(span);
          },
          py::arg("tokens"), "Append tokens, int64 [n], contiguous.")
      .def(
          "propose",
          [](const NgramIndex& self, int64_t k) {
            std::vector<int64_t> copy;
            {
              py::gil_scoped_release unlocked;
              copy = self.propose(k);
            }
            py::array_t<int64_t> result(static_cast<py::ssize_t>(copy.size()));
            if (!copy.empty()) std::memcpy(result.mutable_data(), copy.data(), copy.size() * sizeof(int64_t));
            return result;
          },
          py::arg("k"),
          "What followed the most recent earlier occurrence of the longest matching suffix of min_ngram..max_ngram\n"
          "tokens, int64 [k], or int64 [0] where nothing matches. A copy that reaches the end of the text goes on\n"
          "through its own tokens. ValueError for k < 0.")
      .def("__len__", &NgramIndex::size, "Number of tokens so far.");
}
