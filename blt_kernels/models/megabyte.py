from blt_kernels.nn import ByteModel
class MegaByte(ByteModel): pass
class MegaByteConfig: pass
