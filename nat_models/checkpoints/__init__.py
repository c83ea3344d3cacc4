"""Reading weights: safe loading of files, and published key layouts brought into this package's."""

from nat_models.checkpoints.files import CheckpointError, read_checkpoint, write_safetensors
from nat_models.checkpoints.layouts import LAYOUTS, layout_of, to_layout, to_ours
from nat_models.checkpoints.loading import (
    checkpoint_filter_fn,
    convert_before_loading,
    load_checkpoint,
    load_weights,
)

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "checkpoint_filter_fn",
    "convert_before_loading",
    "layout_of",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
    "to_layout",
    "to_ours",
    "write_safetensors",
]
