import pytest
import torch

from nat_models.benchmark.components import attention_kernels, component, milliseconds_by_component
from neighborhood_attention.backends.triton import fused  # noqa: F401 (its kernels are looked for)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("_forward_kernel", "attention"),
        ("_query_gradient_kernel_0", "attention"),
        ("_ring_forward_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("triton_tem_fused_flex_attention_3", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_nhwckrsc_nhwc", "convolution"),
        ("conv_depthwise2d_forward_kernel", "convolution"),
        ("vectorized_layer_norm_kernel", "normalization"),
        ("triton_per_fused_add_native_layer_norm_5", "normalization"),
        ("GammaBetaBackwardCUDAKernel", "normalization"),
        ("nvjet_sm90_tst_128x256_64x4", "matrix products"),
        ("_small_linear_kernel", "matrix products"),
        ("triton_poi_fused_gelu_2", "activation"),
        ("triton_poi_fused__to_copy_1", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_add_0", "other"),
    ],
)
def test_a_kernel_belongs_to_a_component(kernel, expected):
    assert component(kernel, attention_kernels()) == expected


@pytest.mark.gpu
def test_the_time_of_a_product_is_found():
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times = milliseconds_by_component(lambda: matrix @ matrix, calls=3)
    assert times.pop("matrix products") > 0.1
    assert sum(times.values()) < 0.1
