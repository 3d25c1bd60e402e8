"""Quantising with a text: decoder layers in their order, each matrix told by what it really reads."""

from .driver import Calibrated, calibrated
from .method import ChooseScales, DataFree, Method, Solver
from .run import Run
from .statistics import Channels, Statistics
from .work import opened_work, work_path

__all__ = [
    "Calibrated",
    "Channels",
    "ChooseScales",
    "DataFree",
    "Method",
    "Run",
    "Solver",
    "Statistics",
    "calibrated",
    "opened_work",
    "work_path",
]
