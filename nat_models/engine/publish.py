"""A trained model as a folder that `timm.create_model("local-dir:...")` opens, and on the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.models import save_for_hf
from timm.models._hub import generate_readme

from nat_models.data import ImageDataModule
from nat_models.engine.callbacks import accuracy
from nat_models.engine.module import Classifier
from nat_models.errors import RunStopped


def write_model(folder: Path, module: Classifier, data: ImageDataModule) -> None:
    """Write model.safetensors and config.json, with the classes' names and the preprocessing.

    Args:
        folder: Where to.
        module: Whole, not sharded.
        data: What it was trained on.
    """
    config: dict[str, Any] = {"num_classes": module.num_classes}
    if data.class_names:
        config["label_names"] = data.class_names
    save_for_hf(module.model, str(folder), config, safe_serialization=True, data_config=data.config)


def write_card(
    folder: Path, module: Classifier, data: ImageDataModule, metrics: dict[str, float], images: int
) -> None:
    """Write README.md, the model card.

    Args:
        folder: Where the model is.
        module: The model.
        data: What it was trained and evaluated on.
        metrics: Held-out loss and accuracies.
        images: Number of images that these are of.
    """
    name = module.hparams["model"]["name"]
    size = "x".join(map(str, data.config["input_size"]))
    card = {
        "tags": ["image-classification", "timm", "neighborhood-attention"],
        "license": "mit",
        "description": f"`{name}`, trained on {data.settings.name} with nat-models.",
        "details": {
            "Parameters": f"{sum(p.numel() for p in module.model.parameters()):,}",
            "Classes": module.num_classes,
            "Input": f"{size}, mean {data.config['mean']}, std {data.config['std']}",
            "Held-out images": f"{images:,}, {accuracy(metrics)}",
        },
        "usage": "```python\nimport timm\nimport nat_models  # registers the models\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # this folder\n```\n',
    }
    (folder / "README.md").write_text(generate_readme(card, name))


def check_repository(repository: str) -> None:
    """Raise ValueError if it has not the form ORG/NAME, as the hub spells them."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise ValueError("it names no ORG")
    except ValueError as error:
        raise ValueError(f"push_to_hub={repository}: expected ORG/NAME: {error}") from error


def push(folder: Path, repository: str) -> None:
    """Upload a model's folder to the Hugging Face hub, with the user's own login.

    Raises:
        RunStopped: It cannot be uploaded; the folder stays.
    """
    try:
        api = HfApi(library_name="timm")
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the model")
    except Exception as error:  # the network's and the hub's many
        raise RunStopped(f"push_to_hub={repository}: {error}; the model is in {folder}") from error
