"""Neighborhood attention for PyTorch: Triton kernels on the GPU, plain PyTorch everywhere else."""

from neighborhood_attention.api import (
    na1d,
    na1d_qkvpacked,
    na2d,
    na2d_qkvpacked,
    na3d,
    na3d_qkvpacked,
)
from neighborhood_attention.backends import BACKENDS, resolve_backend
from neighborhood_attention.maps import attention_maps
from neighborhood_attention.merge import merge_attentions
from neighborhood_attention.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from neighborhood_attention.scores import neighborhood_apply, neighborhood_scores


def list_backends() -> list[str]:
    """Names that `backend=` accepts."""
    return list(BACKENDS)


__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention_maps",
    "list_backends",
    "merge_attentions",
    "na1d",
    "na1d_qkvpacked",
    "na2d",
    "na2d_qkvpacked",
    "na3d",
    "na3d_qkvpacked",
    "neighborhood_apply",
    "neighborhood_scores",
    "resolve_backend",
]
