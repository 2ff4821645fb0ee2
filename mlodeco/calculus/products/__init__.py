"""Second-derivative products of a level's loss, in several modes behind one signature.

With ``g`` the gradient of the level's loss C in its own parameters w, detached parts
held constant, and reads ``lambda``:

- ``hvp(v)`` is ``(dg/dw)^T v``: the Hessian-vector product, where nothing is detached;
- ``cross(v)`` is ``(dg/dlambda)^T v`` for each target level;
- ``touched()`` names the parameters that the loss depends on.
"""

from mlodeco.calculus.products.choice import (
    LINEARIZATIONS,
    PRODUCTS,
    open_curvature,
    open_linearization,
)
from mlodeco.calculus.products.compiled import Compiler
from mlodeco.calculus.products.difference import Difference
from mlodeco.calculus.products.first_order import differentiate_once
from mlodeco.calculus.products.fitted import fit_curvature, fit_linearization
from mlodeco.calculus.products.protocol import Cross, Curvature, Linearization
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.products.shared import (
    first_gradient,
    push_gradient,
    share_curvature,
    share_linearization,
)

__all__ = [
    "LINEARIZATIONS",
    "PRODUCTS",
    "Compiler",
    "Cross",
    "Curvature",
    "Difference",
    "Linearization",
    "Reverse",
    "differentiate_once",
    "first_gradient",
    "fit_curvature",
    "fit_linearization",
    "open_curvature",
    "open_linearization",
    "push_gradient",
    "share_curvature",
    "share_linearization",
]
