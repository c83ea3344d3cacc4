"""Models by name, and switches that change how they are trained."""

from typing import Any

import timm
from torch import nn

import nat_models  # noqa: F401 - registers the models
from nat_models.names import check_model_name
from neighborhood_attention import NeighborhoodAttention2D, list_backends


def build_model(
    name: str | None,
    pretrained: bool = False,
    weights_of: str | None = None,
    rescale_to: int | None = None,
    attention_backend: str | None = None,
    key: str = "model",
    **options: Any,
) -> Any:
    """Create any model that timm knows, ours included.

    Args:
        name: Registered name, with or without a tag, or a `hf-hub:` or `local-dir:` address.
        pretrained: Whether to load the published weights.
        weights_of: Name of the model whose published weights to load instead; its classifier is
            left out where the classes differ.
        rescale_to: Side in pixels that the model's dilations, and its input size, are adapted to.
        attention_backend: Backend of every neighborhood attention; None: chosen by the device.
        key: The configuration's key of these arguments, for messages.
        **options: Further arguments of `timm.create_model`; None values are left out.

    Raises:
        ValueError: There is no such model or backend, the model does not take an option, or it has
            no neighborhood attention to set a backend for.
    """
    if not name:
        raise ValueError(
            f"{key}.name is not set: expected the name of a timm model, such as nat_tiny"
        )
    check_model_name(f"{key}.name", name)
    if attention_backend is not None and attention_backend not in list_backends():
        raise ValueError(
            f"{key}.attention_backend={attention_backend}: expected one of {list_backends()}"
        )
    if weights_of is not None:
        pretrained = True
        options["pretrained_cfg_overlay"] = _weights(weights_of, key)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:  # an argument that the model does not have
        raise ValueError(f"{key}.name={name}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{key}.pretrained=true: no weights for {weights_of or name}: {reason}"
        ) from error
    if rescale_to is not None:
        try:
            model.set_input_size(rescale_to, rescale_dilations=True)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{key}.rescale_to={rescale_to}: {name} has no dilations") from error
    if attention_backend is not None:
        if not hasattr(model, "set_attention_backend"):
            raise ValueError(
                f"{key}.attention_backend={attention_backend}: {name} has no neighborhood attention"
            )
        model.set_attention_backend(attention_backend)
    return model


def _weights(name: str, key: str) -> dict[str, Any]:
    """Where a model's weights are, as timm keeps it."""
    check_model_name(f"{key}.weights_of", name)
    source: Any = timm.get_pretrained_cfg(name)
    if source is None or not source.has_weights:
        raise ValueError(f"{key}.weights_of={name}: timm knows no weights of it")
    fields = ("url", "file", "hf_hub_id", "hf_hub_filename", "num_classes")
    return {field: getattr(source, field) for field in fields}


def checkpoint_activations(model: Any) -> None:
    """Turn activation checkpointing on.

    Raises:
        ValueError: The model has none.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"task.grad_checkpointing=true: {type(model).__name__} does not support it"
        ) from error


def freeze_all_but_classifier(model: Any) -> None:
    """Leave only the classifier to be trained."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)


def neighborhood_attentions(model: nn.Module) -> dict[str, NeighborhoodAttention2D]:
    """The neighborhood attention modules of a model, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NeighborhoodAttention2D)
    }
