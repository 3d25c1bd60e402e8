"""Where a bundle breaks: its graph beside PyTorch, layer by layer and op group by op group."""

from .finding import Bisection, Row
from .run import bisect

__all__ = ["Bisection", "Row", "bisect"]
