"""Integrations put the ops under the models of other code bases, in place, and take them out again."""

from blt_kernels.integrations._applied import Applied as Applied
from blt_kernels.integrations._applied import Report as Report

__all__ = ["Applied", "Report"]
