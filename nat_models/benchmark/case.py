"""What a number is measured of."""

from dataclasses import asdict, dataclass
from typing import Any, cast

from timm.models import get_pretrained_cfg

EXECUTIONS = ["eager", "captured", "compiled", "cuda_graphs", "captured_compiled"]
GRAPHS = {"captured", "cuda_graphs", "captured_compiled"}
PRECISIONS = ["float32", "tf32", "bfloat16", "float16", "bfloat16-true", "float16-true"]


@dataclass(frozen=True)
class Case:
    """One model under one condition.

    Attributes:
        model: A name that timm knows.
        kind: "inference", or "training": forward, cross entropy, backward, AdamW.
        execution: "eager"; "captured", the eager step as one CUDA graph; "compiled";
            "cuda_graphs", compiled and replayed as CUDA graphs (`mode="reduce-overhead"`); or
            "captured_compiled", the compiled step as one CUDA graph: what PyTorch checks and
            copies before it replays one of its own is left out.
        batch_size: Images of a step.
        precision: "float32"; "tf32", for products and convolutions; "bfloat16" or "float16" for
            autocast; with "-true" for weights and images of that type.
        input_size: Pixels a side, None for the model's own size.
        attention_backend: Of neighborhood attention, None for the device's own choice.
        channels_last: Memory layout of images and weights.
    """

    model: str
    kind: str
    execution: str
    batch_size: int
    precision: str = "bfloat16"
    input_size: int | None = None
    attention_backend: str | None = None
    channels_last: bool = True

    @property
    def is_compiled(self) -> bool:
        """Whether PyTorch compiles the model."""
        return self.execution not in ("eager", "captured")

    @property
    def is_captured(self) -> bool:
        """Whether the benchmark records the whole step as one CUDA graph."""
        return self.execution.startswith("captured")

    @property
    def image_shape(self) -> list[int]:
        """Channels, height and width of an image."""
        channels, *own = cast(Any, get_pretrained_cfg(self.model)).input_size
        return [channels, *(own if self.input_size is None else [self.input_size] * 2)]

    def as_record(self) -> dict[str, Any]:
        """The case as the results' JSON states it."""
        fields = asdict(self)
        return {"model": fields.pop("model"), "pass": fields.pop("kind")} | {
            **fields,
            "input_size": self.image_shape,
        }
