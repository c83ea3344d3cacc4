"""The work that is timed: one inference or one training step of a model."""

from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nat_models.benchmark.case import Case

Step = Callable[[], object]


def create_model(case: Case, device: torch.device) -> nn.Module:
    """The model with random weights, on the device, at the case's resolution."""
    with device:  # drawing the weights of a large model takes a processor ten seconds
        model = _sized(case)
    if case.attention_backend is not None and hasattr(model, "set_attention_backend"):
        model.set_attention_backend(case.attention_backend)
    model.to(device=device, dtype=_dtype(case), memory_format=_layout(case))
    return cast(nn.Module, model)


def create_images(case: Case, device: torch.device) -> Tensor:
    """Random images [B, 3, H, W]: zeros would draw less power and let the clock run faster."""
    images = torch.randn(case.batch_size, *case.image_shape, device=device)
    return images.to(dtype=_dtype(case), memory_format=_layout(case))


def create_step(model: nn.Module, images: Tensor, case: Case) -> Step:
    """A function that runs one step of a model on images, which are on its device."""
    device_type = images.device.type
    is_tf32 = case.precision == "tf32"
    torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = is_tf32  # PyTorch lets convolutions use it by default
    model.train(case.kind == "training")
    graphs = case.execution == "cuda_graphs"
    if case.is_compiled:
        model.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
    casts = case.precision in ("bfloat16", "float16")
    dtype = getattr(torch, case.precision) if casts else torch.bfloat16

    def forward() -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device_type, dtype, enabled=casts):
            return cast(Tensor, model(images))

    step: Step = torch.inference_mode()(forward)
    if case.kind == "training":
        step = _training(model, images, case, forward)
    return capture(step) if case.is_captured else step


def _training(model: nn.Module, images: Tensor, case: Case, forward: Callable[[], Tensor]) -> Step:
    device_type = images.device.type
    classes = cast(int, model.num_classes)
    targets = torch.randint(classes, images.shape[:1], device=images.device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1e-5,
        fused=device_type in ("cpu", "cuda"),
        capturable=case.is_captured,
    )
    scaler = torch.amp.GradScaler(device_type, enabled=case.precision == "float16")

    def train() -> None:
        loss = F.cross_entropy(forward(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


def capture(step: Step) -> Step:
    """The step as one CUDA graph: the first call runs it, the second records, all others replay."""
    graph: torch.cuda.CUDAGraph | None = None
    is_warm = False

    def replay() -> None:
        nonlocal graph, is_warm
        if not is_warm:  # on a stream of its own, as recording
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            is_warm = True
            return
        if graph is None:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                step()
            graph = recorded
        graph.replay()

    return replay


def count_flops(case: Case) -> int:
    """Floating-point operations of the matrix products and convolutions of one image, forward."""
    with torch.device("meta"):
        model = _sized(case).eval()
        image = torch.empty(1, *case.image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops())


def _sized(case: Case) -> Any:
    model: Any = timm.create_model(case.model)
    if case.input_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(case.input_size, case.input_size))
    return model


def _dtype(case: Case) -> torch.dtype:
    true = case.precision.endswith("-true")
    return getattr(torch, case.precision.removesuffix("-true")) if true else torch.float32


def _layout(case: Case) -> torch.memory_format:
    return torch.channels_last if case.channels_last else torch.contiguous_format
