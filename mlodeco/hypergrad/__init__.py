"""The methods that differentiate a best response, one file each, and their names.

Each is an immutable record of its options. With H the Hessian of the lower level's loss in
its own parameters (more exactly the transposed Jacobian of the gradient field that the loss
gives, detached parts held constant), b the cotangent and ``cross`` the mixed second
derivative, a method returns ``v`` near ``H^-1 b`` and ``cross^T v``.
"""

from mlodeco.calculus.response import Method, Response, Solution, Status
from mlodeco.hypergrad.cg import CG
from mlodeco.hypergrad.converged import Converged
from mlodeco.hypergrad.custom import Custom
from mlodeco.hypergrad.dense import Dense
from mlodeco.hypergrad.expressions import UNREADABLE, read_method
from mlodeco.hypergrad.finite_difference import FiniteDifference
from mlodeco.hypergrad.gmres import GMRES
from mlodeco.hypergrad.identity import Identity
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.knobs import turned
from mlodeco.hypergrad.minres import MINRES
from mlodeco.hypergrad.neumann import Neumann
from mlodeco.hypergrad.nystrom import Nystrom
from mlodeco.hypergrad.options import Guide
from mlodeco.hypergrad.sama import Sama
from mlodeco.hypergrad.table import NAMES, describe, resolve, spell
from mlodeco.hypergrad.unroll import Unroll
from mlodeco.hypergrad.unroll_forward import UnrollForward

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "NAMES",
    "UNREADABLE",
    "Converged",
    "Custom",
    "Dense",
    "FiniteDifference",
    "Guide",
    "Identity",
    "Implicit",
    "MatVec",
    "Method",
    "Neumann",
    "Nystrom",
    "Response",
    "Sama",
    "Solution",
    "Status",
    "Unroll",
    "UnrollForward",
    "describe",
    "read_method",
    "resolve",
    "spell",
    "turned",
]
