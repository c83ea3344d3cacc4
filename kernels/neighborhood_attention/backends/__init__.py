"""The implementations of the operators, and the choice among them.

A backend is a module with three functions:

    supports(query, rpb, window) -> str | None
        Why it cannot run this problem, or None when it can.
    forward(query, key, value, rpb, window, scale) -> (output, lse)
        Both contiguous.
    backward(grad_output, grad_lse, query, key, value, rpb, output, lse, window, scale,
             grad_query, grad_key, grad_value) -> grad_rpb | None
        Fills the three gradient buffers given to it; they may be strided views.
"""

import importlib
import logging
from functools import cache
from types import ModuleType

from torch import Tensor

from neighborhood_attention.geometry import Neighborhood

# In the order of preference on a GPU.
BACKENDS = {
    "fused": "neighborhood_attention.backends.triton.fused",
    "reference": "neighborhood_attention.backends.reference",
}

_log = logging.getLogger("neighborhood_attention")


def check_name(backend: str | None) -> None:
    """Raise unless `backend` is None or the name of a backend."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{backend=}: expected None or one of {sorted(BACKENDS)}")


def resolve_backend(device_type: str) -> str:
    """The backend that `backend=None` prefers on a type of device ("cpu", "cuda")."""
    return "fused" if device_type == "cuda" else "reference"


def choose(
    backend: str | None, query: Tensor, rpb: Tensor | None, window: Neighborhood
) -> ModuleType:
    """The module that runs this problem.

    Raises:
        ValueError: No backend has this name.
        NotImplementedError: The backend asked for cannot run the problem.
    """
    check_name(backend)
    name = backend or resolve_backend(query.device.type)
    try:
        reason = load(name).supports(query, rpb, window)
    except ModuleNotFoundError as error:
        reason = f"needs the package {error.name}, which is not installed"
    if reason is None:
        return load(name)
    if backend is not None:
        raise NotImplementedError(f"{backend=} {reason}")
    _log_fallback(name, reason)
    return load("reference")


@cache
def load(name: str) -> ModuleType:
    """The backend's module; Triton is imported here, on its first use."""
    return importlib.import_module(BACKENDS[name])


@cache
def _log_fallback(name: str, reason: str) -> None:
    _log.info("backend 'reference' is used: %r %s", name, reason)


__all__ = ["BACKENDS", "check_name", "choose", "load", "resolve_backend"]
