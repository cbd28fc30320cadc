"""Train cheaper by not computing the part of the gradient that does not matter, with no change to the model.

::

    from sparse_compile import Reuse, Schedule, sparse_backend

    backend = sparse_backend(Schedule(linear=Reuse(0.9)))
    model = torch.compile(model, backend=backend)
"""

from sparse_compile.backend import SparseBackend, default_backend, sparse_backend
from sparse_compile.report import Report
from sparse_compile.schedule import Phase, Schedule
from sparse_compile.settings.monitor import Monitor
from sparse_compile.settings.prune import PruneSaved
from sparse_compile.settings.reuse import Reuse
from sparse_compile.settings.rotate import RotatedTopK
from sparse_compile.settings.sample import Sample

__version__ = "0.1.0"

__all__ = [
    "Monitor",
    "Phase",
    "PruneSaved",
    "Report",
    "Reuse",
    "RotatedTopK",
    "Sample",
    "Schedule",
    "SparseBackend",
    "__version__",
    "default_backend",
    "sparse_backend",
]
