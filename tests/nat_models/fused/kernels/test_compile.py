"""Every kernel compiles for Hopper; that needs no GPU, and the interpreter misses such errors."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is not available on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nat_models.fused.kernels import layer_norm, linear_gelu, small_linear  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes that a program may have
NUMBERS = {"rows", "rows_per_sample", "blocks", "programs", "tiles"}


def compile_kernel(kernel, constants, types, **options):
    """Tensors are in bfloat16 unless `types` says otherwise, and aligned."""
    signature, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = "i32" if name in NUMBERS else types.get(name, "*bf16")
        if not signature[name].startswith("tensordesc"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=HOPPER, options=options)


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "gradient"])
def test_products(channels, is_gradient):
    ways = {
        "rows": linear_gelu._gemm_gelu_rows_kernel,
        "tiles": linear_gelu._gemm_gelu_tile_kernel,
        "persistent": linear_gelu._gemm_gelu_persistent_kernel,
    }
    tile = linear_gelu.choose_tile(channels, is_gradient)
    m, n, k = tile.rows, tile.columns, tile.channels
    sizes = {"x": (m, k), "weight": (k, n) if is_gradient else (n, k)}
    sizes |= dict.fromkeys(("hidden", "output", "activated"), (m, n))
    types = {name: f"tensordesc<bf16[{a},{b}]>" for name, (a, b) in sizes.items()}
    constants = {"WIDTH": 3 * channels, "CHANNELS": channels, "M": m, "N": n, "K": k}
    constants |= dict.fromkeys(["bias"] if is_gradient else ["activated", "parts"])
    compiled = compile_kernel(
        ways[tile.way], constants, types | {"bias": "*fp32", "parts": "*fp32"},
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    assert "wgmma" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("has_branch", [True, False], ids=["branch", "alone"])
def test_layer_norm(has_branch):
    rows, columns = layer_norm._block(96)
    constants = {"EPS": 1e-5, "CHANNELS": 96, "ROWS": rows, "COLUMNS": columns}
    absent = [] if has_branch else ["branch", "gamma", "keep"]
    fp32 = ["total", "rstd", "grad_total", "grad_x", "gamma", "parts"]
    types = dict.fromkeys(fp32, "*fp32")
    for kernel, unused in (
        (layer_norm._layer_norm_forward_kernel, ["total", "standardized", "rstd"]),
        (
            layer_norm._layer_norm_backward_kernel,
            ["grad_total", "grad_branch", "bias", "normalized"],
        ),
    ):
        nothing = dict.fromkeys([] if has_branch else absent + unused)
        compile_kernel(kernel, constants | nothing, types, num_warps=4)


NORMS = [(3136, 64, 192), (196, 256, 768), (49, 1024, 3072)]  # rows, channels, width
RESIDUALS = [(3136, 192, 64), (196, 768, 256), (49, 3072, 1024), (49, 8192, 1024)]


@pytest.mark.parametrize(
    ("shape", "has_norm"), [*((s, True) for s in NORMS), *((s, False) for s in RESIDUALS)], ids=str
)
def test_small_linear(shape, has_norm):
    rows, channels, width = shape
    tile = small_linear.choose_tile(rows, channels, width, has_norm)
    constants = {
        "EPS": 1e-5, "CHANNELS": channels, "WIDTH": width, "HAS_GELU": has_norm, "OVERLAPS": True,
        "M": tile.rows, "N": tile.columns, "K": tile.channels,
    }  # fmt: skip
    absent = ["gamma", "residual"] if has_norm else ["norm_weight", "norm_bias"]
    compiled = compile_kernel(
        small_linear._small_linear_kernel, constants | dict.fromkeys(absent), {},
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=True,
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    assert "mma" in ptx
    assert compiled.metadata.shared <= SHARED_MEMORY
    # What the kernel before has written is read after its end alone.
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert "st.global" not in before
    assert "ld.global" in after or "cp.async" in after
    assert "griddepcontrol.launch_dependents" not in before  # waiting programs take room
    assert "griddepcontrol.launch_dependents" in after
