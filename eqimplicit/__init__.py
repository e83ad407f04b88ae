from . import models as models
from ._adjoint.implicit import ImplicitAdjoint as ImplicitAdjoint
from ._adjoint.jfb import JFBAdjoint as JFBAdjoint
from ._adjoint.neumann import NeumannAdjoint as NeumannAdjoint
from ._adjoint.phantom import PhantomAdjoint as PhantomAdjoint
from ._diagnostics.contraction import (
    contraction_factor as contraction_factor,
    ContractionMonitor as ContractionMonitor,
)
from ._diagnostics.convergence import convergence_history as convergence_history
from ._diagnostics.gradient import (
    gradient_report as gradient_report,
    GradientReport as GradientReport,
)
from ._diagnostics.spectrum import (
    spectral_norm as spectral_norm,
    spectral_radius as spectral_radius,
)
from ._layer.deq import DEQ as DEQ
from ._layer.ode_block import ODEBlock as ODEBlock
from ._layer.theta import (
    stability_function as stability_function,
    ThetaLayer as ThetaLayer,
)
from ._linear_solver.fixed_point import FixedPointLinearSolver as FixedPointLinearSolver
from ._linear_solver.gmres import GMRES as GMRES
from ._linear_solver.neumann_krylov import NeumannKrylov as NeumannKrylov
from ._linear_solver.neumann_series import NeumannSeries as NeumannSeries
from ._parametrisation.base import (
    AbstractParametrisation as AbstractParametrisation,
    resolve as resolve,
)
from ._parametrisation.norm import WeightNorm as WeightNorm
from ._solver.anderson import Anderson as Anderson
from ._solver.broyden import Broyden as Broyden
from ._solver.picard import Picard as Picard
from ._solver.root_as_fixed_point import RootAsFixedPoint as RootAsFixedPoint
