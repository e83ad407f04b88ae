from . import models as models
from ._adjoint.adaptive_neumann import (
    AdaptiveNeumannAdjoint as AdaptiveNeumannAdjoint,
)
from ._adjoint.implicit import ImplicitAdjoint as ImplicitAdjoint
from ._adjoint.jfb import JFBAdjoint as JFBAdjoint
from ._adjoint.neumann import NeumannAdjoint as NeumannAdjoint
from ._adjoint.phantom import PhantomAdjoint as PhantomAdjoint
from ._adjoint.probe import (
    backward_probe as backward_probe,
    BackwardStatus as BackwardStatus,
    with_probe as with_probe,
)
from ._adjoint.randomised_neumann import (
    RandomisedNeumannAdjoint as RandomisedNeumannAdjoint,
)
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
    lipschitz_constant as lipschitz_constant,
    spectral_norm as spectral_norm,
    spectral_radius as spectral_radius,
)
from ._diagnostics.summary import (
    SolveSummary as SolveSummary,
    summarise as summarise,
)
from ._layer.base import SolveOptions as SolveOptions
from ._layer.defaults import default_solver as default_solver
from ._layer.deq import DEQ as DEQ
from ._linear_solver.fixed_point import FixedPointLinearSolver as FixedPointLinearSolver
from ._linear_solver.gmres import GMRES as GMRES
from ._linear_solver.neumann_krylov import NeumannKrylov as NeumannKrylov
from ._linear_solver.neumann_series import NeumannSeries as NeumannSeries
from ._parametrisation.base import (
    AbstractParametrisation as AbstractParametrisation,
    resolve as resolve,
)
from ._parametrisation.bounded import BoundedSpectrum as BoundedSpectrum
from ._parametrisation.spectral_norm import (
    advance_spectral_norms as advance_spectral_norms,
    SpectralNorm as SpectralNorm,
    with_spectral_norm as with_spectral_norm,
)
from ._parametrisation.untrained import Untrained as Untrained
from ._parametrisation.weight_norm import WeightNorm as WeightNorm
from ._regularisation.base import (
    divergence as divergence,
    divergence_and_frobenius as divergence_and_frobenius,
    jacobian_diagonal as jacobian_diagonal,
    jacobian_frobenius as jacobian_frobenius,
)
from ._regularisation.trajectory import (
    kinetic_penalty as kinetic_penalty,
    total_derivative as total_derivative,
    total_variation as total_variation,
    trajectory_penalty as trajectory_penalty,
)
from ._residual.base import (
    AbstractImplicitLayer as AbstractImplicitLayer,
    AbstractResidualLayer as AbstractResidualLayer,
    StepEquation as StepEquation,
)
from ._residual.diffrax import diffrax_solver as diffrax_solver
from ._residual.explicit import (
    LeapfrogLayer as LeapfrogLayer,
    MidpointLayer as MidpointLayer,
    RevNetLayer as RevNetLayer,
    VerletLayer as VerletLayer,
)
from ._residual.fp_resnet import FPResNet as FPResNet
from ._residual.hamiltonian import HamiltonianField as HamiltonianField
from ._residual.ode_block import ODEBlock as ODEBlock
from ._residual.runge_kutta import RungeKuttaLayer as RungeKuttaLayer
from ._residual.tableau import ButcherTableau as ButcherTableau
from ._residual.theta import (
    stability_function as stability_function,
    ThetaLayer as ThetaLayer,
)
from ._solver.anderson import Anderson as Anderson
from ._solver.as_fixed_point import (
    MinimiserAsFixedPoint as MinimiserAsFixedPoint,
    RootAsFixedPoint as RootAsFixedPoint,
)
from ._solver.best_so_far import BestSoFar as BestSoFar
from ._solver.broyden import Broyden as Broyden
from ._solver.budget import Budget as Budget
from ._solver.noisy import Noisy as Noisy
from ._solver.patience import Patience as Patience
from ._solver.picard import Picard as Picard
from ._solver.recorded import Recorded as Recorded
