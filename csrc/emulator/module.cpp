// Importing blt_emulator registers the emulated kernels as blt_emulated::<op>. Its functions are for tests.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

namespace py = pybind11;
using namespace blt::emulator;

PYBIND11_MODULE(blt_emulator, module) {
  module.doc() = "CUDA kernels of blt_kernels on the CPU, for tests.";
  py::class_<Launch>(module, "Launch", "The record of a launch; read and written are bytes of whole sectors of 32.")
      .def_readonly("kernel", &Launch::kernel)
      .def_property_readonly("grid", [](const Launch& x) { return std::pair(x.config.grid.x, x.config.grid.y); })
      .def_property_readonly("block", [](const Launch& x) { return x.config.block; })
      .def_property_readonly("smem_bytes", [](const Launch& x) { return x.config.smem_bytes; })
      .def_readonly("read", &Launch::read)
      .def_readonly("written", &Launch::written)
      .def_readonly("loaded", &Launch::loaded)
      .def_readonly("stored", &Launch::stored)
      .def_readonly("longest", &Launch::longest);
  py::enum_<Order>(module, "Order")
      .value("FORWARD", Order::kForward)
      .value("BACKWARD", Order::kBackward)
      .value("RANDOM", Order::kRandom);
  module.def("set_order", &set_order, py::arg("order"), py::arg("seed") = 0, "Set the order of blocks and threads.");
  module.def("kernels", &kernels, "The names of all kernels that launchers can launch.");
  module.def("take_launches", [] { return std::exchange(launches(), {}); }, "Return the launches since the last call.");
}
