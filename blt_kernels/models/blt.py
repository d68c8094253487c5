from blt_kernels.nn import ByteModel
class BLT(ByteModel): pass
class BLTConfig: pass
