"""How many threads the libraries of linear algebra take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Literal

from threadpoolctl import ThreadpoolController


def single_threaded(
    user_api: Literal["blas", "openmp"] | None = None,
) -> AbstractContextManager[object]:
    """Context in which linear algebra has one thread.

    Vectors and matrices of one image are so small that several threads wait for each other longer
    than they compute. The limit holds for the whole process; where several threads take it, one
    around all of them keeps it until the last has ended.

    Args:
        user_api: `blas` for NumPy's and SciPy's alone, which torch has no part in; None for all.
    """
    return _thread_pools().limit(limits=1, user_api=user_api)


@cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of the libraries that are loaded when it is first asked for."""
    return ThreadpoolController()
