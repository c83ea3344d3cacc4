"""Images for training and evaluation: sources, transforms, loaders."""

from nat_models.data.datamodule import ImageDataModule

__all__ = ["ImageDataModule"]
