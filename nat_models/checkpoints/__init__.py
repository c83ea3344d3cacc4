"""Reading weights: safe loading of files, and published key layouts brought into this package's."""

from nat_models.checkpoints.files import CheckpointError, read_checkpoint, sha256, write_checkpoint
from nat_models.checkpoints.layouts import LAYOUTS, layout_of, to_layout, to_ours, without_prefix
from nat_models.checkpoints.loading import (
    checkpoint_filter_fn,
    convert_before_loading,
    load_checkpoint,
    load_weights,
    mismatches,
    pretrained_filter_fn,
    shown,
)

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "checkpoint_filter_fn",
    "convert_before_loading",
    "layout_of",
    "load_checkpoint",
    "load_weights",
    "mismatches",
    "pretrained_filter_fn",
    "read_checkpoint",
    "sha256",
    "shown",
    "to_layout",
    "to_ours",
    "without_prefix",
    "write_checkpoint",
]
