"""Training and evaluation."""

from nat_models.engine.distillation import Distiller
from nat_models.engine.evaluation import evaluate
from nat_models.engine.module import Classifier
from nat_models.engine.run import train

__all__ = ["Classifier", "Distiller", "evaluate", "train"]
