"""A stand-in for facebookresearch/blt: its module, class, function and argument names, and what they compute.

Written from facts about commit 9774ed4 for the tests of `blt_kernels.integrations.bytelatent`, in plain PyTorch with
dense masks: the code base itself is on no package index. What is replaced has the parameters that it has there; the
rest is as short as it can be. The names of weights are those of its checkpoints.
"""
