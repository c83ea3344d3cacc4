"""Evaluate a model: python eval.py ckpt=PATH (the same as nat-eval)."""

from nat_models.cli import evaluate

if __name__ == "__main__":
    evaluate()
