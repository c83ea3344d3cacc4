"""Train a model: python train.py experiment=demo (the same as nat-train)."""

from nat_models.cli import train

if __name__ == "__main__":
    train()
