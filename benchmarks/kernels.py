"""Times of the operator, forward and backward, beside the time its memory traffic alone would take.

    PYTHONPATH=kernels python benchmarks/kernels.py results.json --commit COMMIT

Needs a GPU, PyTorch and Triton. Each shape is first checked against the reference backend in fp64.

The operator, with its bias and the bias's gradient, is captured in a CUDA graph; a time is the
median of graph replays with a cold L2 cache. The floor is the bytes that must move at least
(forward q, k, v, o; backward q, k, v, o, do, dq, dk, dv) over the bandwidth of a large copy,
measured in the same run.
"""

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path

import torch
import triton

import neighborhood_attention  # noqa: F401  registers the operators

OPERATORS = torch.ops.neighborhood_attention
BATCH, HEAD_DIM, KERNEL_SIZE = 128, 32, 7
# Side of the map, heads, dilation: the layers of NAT-Tiny and DiNAT-Tiny at 224 pixels.
SHAPES = [(56, 2, 1), (28, 4, 1), (14, 8, 1), (7, 16, 1), (56, 2, 8), (28, 4, 4), (14, 8, 2)]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def main() -> None:
    """Measure all shapes and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    results = [measure(*shape, dtype, bandwidth) for dtype in TOLERANCE for shape in SHAPES]
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    description = {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "commit": arguments.commit,
        "date": datetime.date.today().isoformat(),
        "method": " ".join(__doc__.split("\n\n")[3].split()),
        "copy_bandwidth_tb_s": bandwidth / 1e12,
    }
    arguments.output.write_text(json.dumps({**description, "results": results}, indent=1) + "\n")
    print(table(description, results))


def copy_bandwidth():
    """Bytes a second, read and written, of a device-to-device copy of 4 GiB."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_time(lambda: target.copy_(source)) / 1e6)


def measure(side, heads, dilation, dtype, bandwidth):
    """Check and time one shape; times in microseconds."""
    torch.manual_seed(0)
    window = [KERNEL_SIZE] * 2 + [1] * 2 + [dilation] * 2 + [0] * 2  # see the operators' schemas
    settings = window, HEAD_DIM**-0.5
    qkv, rpb, grad = inputs(3, side, heads, dtype)
    errors = relative_errors(
        step(qkv, rpb, grad, settings, "fused"),
        step(qkv.double(), rpb.double(), grad.double(), settings, "reference"),
    )
    if max(errors.values()) > TOLERANCE[dtype]:
        raise RuntimeError(
            f"{side=} {heads=} {dilation=} {dtype}: wrong results, relative errors {errors}"
        )
    qkv, rpb, grad = inputs(BATCH, side, heads, dtype)
    output, lse = forward(qkv, rpb, settings)
    saved = output, lse, settings, "fused"
    times = {
        "forward_us": graph_time(lambda: forward(qkv, rpb, settings)),
        "forward_without_rpb_us": graph_time(lambda: forward(qkv, None, settings)),
        "backward_us": graph_time(lambda: backward(grad, qkv, rpb, *saved)),
        "backward_without_rpb_us": graph_time(lambda: backward(grad, qkv, None, *saved)),
    }
    floor = 4 * output.nbytes / bandwidth * 1e6
    return {
        "map": [side, side], "heads": heads, "head_dim": HEAD_DIM, "kernel_size": KERNEL_SIZE,
        "dilation": dilation, "batch": BATCH, "dtype": str(dtype).removeprefix("torch."),
        "relative_errors": errors, **times,
        "forward_floor_us": floor, "backward_floor_us": 2 * floor,
    }  # fmt: skip


def inputs(batch, side, heads, dtype):
    """Packed projection, bias (fp32) and the output's gradient, N(0, 1)."""
    qkv = torch.randn(batch, side, side, 3, heads, HEAD_DIM, device="cuda", dtype=dtype)
    rpb = torch.randn(heads, 2 * KERNEL_SIZE - 1, 2 * KERNEL_SIZE - 1, device="cuda")
    return [qkv, rpb, torch.randn(batch, side, side, heads, HEAD_DIM, device="cuda", dtype=dtype)]


def step(qkv, rpb, grad, settings, backend):
    """Results of a forward and a backward pass."""
    output, lse = forward(qkv, rpb, settings, backend)
    grad_qkv, grad_rpb = backward(grad, qkv, rpb, output, lse, settings, backend)
    grad_query, grad_key, grad_value = grad_qkv.unbind(3)
    return {"output": output, "lse": lse, "grad_query": grad_query, "grad_key": grad_key,
            "grad_value": grad_value, "grad_rpb": grad_rpb}  # fmt: skip


def forward(qkv, rpb, settings, backend="fused"):
    """Output and log-sum-exp."""
    return OPERATORS.attention_qkvpacked(qkv, rpb, *settings, backend)


def backward(grad, qkv, rpb, output, lse, settings, backend):
    """The packed gradient and the bias's."""
    results = output, lse, grad, None
    return OPERATORS.attention_qkvpacked_backward(
        qkv, rpb, *settings, backend, *results, [True, rpb is not None]
    )


def relative_errors(actual, exact):
    """Norm of the error over the norm of the exact value."""
    return {name: float((actual[name].double() - x).norm() / x.norm()) for name, x in exact.items()}


def graph_time(function, replays=50):
    """Median time of a captured call, in microseconds; each replay finds a cold L2 cache."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    cold = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    starts, ends = (
        [torch.cuda.Event(enable_timing=True) for _ in range(replays)] for _ in range(2)
    )
    for start, end in zip(starts, ends, strict=True):
        cold.fill_(1)
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)) * 1e3


def table(description, results):
    """The results as a Markdown table."""
    versions = description["versions"]
    lines = [
        f"{description['device']}, torch {versions['torch']}, Triton {versions['triton']}; "
        f"batch {BATCH}, head dimension {HEAD_DIM}, window {KERNEL_SIZE}x{KERNEL_SIZE}; "
        "us (times the floor)",
        "",
        "| map | heads | dilation | dtype | forward | no RPB | backward | no RPB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = ["x".join(map(str, r["map"])), r["heads"], r["dilation"], r["dtype"]]
        for name in ("forward", "backward"):
            for key in (f"{name}_us", f"{name}_without_rpb_us"):
                cells.append(f"{r[key]:.0f} ({r[key] / r[f'{name}_floor_us']:.1f}x)")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
