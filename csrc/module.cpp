// blt_kernels._C, _C_cuda and _C_jit have one attribute, `signatures`. An import loads the shared object, whose static
// initialisers register its kernels with torch (STABLE_TORCH_LIBRARY_IMPL).

#include <Python.h>

#include "common/box.h"

#define BLT_KERNELS_STRING_(x) #x
#define BLT_KERNELS_STRING(x) BLT_KERNELS_STRING_(x)
#define BLT_KERNELS_INIT_(x) PyInit_##x
#define BLT_KERNELS_INIT(x) BLT_KERNELS_INIT_(x)

static int add_signatures(PyObject* module) {
  return PyModule_AddStringConstant(module, "signatures", blt::signatures().c_str());
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&add_signatures)}, {0, nullptr}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "blt_kernels." BLT_KERNELS_STRING(BLT_KERNELS_MODULE),
    "The compiled kernels of blt_kernels, reached through torch.ops.blt_kernels.",
    0,        // no state
    nullptr,  // no functions
    slots,
    nullptr,
    nullptr,
    nullptr,
};

PyMODINIT_FUNC BLT_KERNELS_INIT(BLT_KERNELS_MODULE)() { return PyModuleDef_Init(&definition); }
