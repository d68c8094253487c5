// blt_kernels._C: an empty module. Importing it loads the shared object, whose static initialisers register the kernels
// linked in beside this file (STABLE_TORCH_LIBRARY_IMPL) with torch.

#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "blt_kernels._C",
    "The compiled kernels of blt_kernels, reached through torch.ops.blt_kernels.",
    0,        // no state
    nullptr,  // no functions
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
