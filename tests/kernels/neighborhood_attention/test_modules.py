import io

import pytest
import torch
from torch.nn import functional as F

from neighborhood_attention import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    modules,
    na1d_qkvpacked,
    na2d_qkvpacked,
    na3d_qkvpacked,
)


def test_parameters_are_named_as_in_the_published_checkpoints():
    module = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "rpb": (2, 5, 9), "qkv.weight": (24, 8), "qkv.bias": (24,),
        "proj.weight": (8, 8), "proj.bias": (8,),
    }  # fmt: skip
    bare = NeighborhoodAttention2D(8, 2, 3, qkv_bias=False).state_dict()
    assert set(bare) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_device_and_dtype_are_those_of_all_parameters():
    module = NeighborhoodAttention2D(
        8, 2, 3, rel_pos_bias=True, device="meta", dtype=torch.bfloat16
    )
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_initial_parameters_are_truncated_normal_and_zero():
    module = NeighborhoodAttention2D(64, 2, 31, rel_pos_bias=True)
    for weight in (module.qkv.weight, module.proj.weight, module.rpb):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not module.qkv.bias.any()
    assert not module.proj.bias.any()


def test_it_projects_attends_and_projects_back():
    module = NeighborhoodAttention2D(
        12, 3, (3, 2), dilation=(1, 2), qk_scale=0.3, rel_pos_bias=True
    ).double()
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias).view(2, 5, 6, 3, 3, 4)
    y = na2d_qkvpacked(qkv, (3, 2), dilation=(1, 2), scale=0.3, rpb=module.rpb)
    expected = F.linear(y.reshape(2, 5, 6, 12), module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), expected)


def test_the_window_can_be_changed():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    other = NeighborhoodAttention2D(8, 2, 3, dilation=(2, 1), rel_pos_bias=True)
    other.load_state_dict(module.state_dict())
    module.set_window(3, (2, 1))
    assert repr(module) == repr(other)
    x = torch.randn(1, 7, 6, 8)
    torch.testing.assert_close(module(x), other(x))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_a_bias_of_another_kernel_size_is_refused(kernel_size):
    module = NeighborhoodAttention2D(8, 2, 5, rel_pos_bias=True)
    with pytest.raises(ValueError, match=r"kernel_size=.*: expected that of rpb, .*\(2, 9, 9\)"):
        module.set_window(kernel_size, 1)
    assert module.kernel_size == (5, 5)


@pytest.mark.parametrize(
    ("cls", "function", "spatial"),
    [
        (NeighborhoodAttention1D, na1d_qkvpacked, (7,)),
        (NeighborhoodAttention3D, na3d_qkvpacked, (6, 5, 4)),
    ],
    ids=["1d", "3d"],
)
def test_one_and_three_axes_do_the_same(cls, function, spatial):
    dims = len(spatial)
    small, padded = (4, *spatial[1:]), (6, *spatial[1:])
    module = cls(8, 2, 3, dilation=(2, 1, 1)[:dims], rel_pos_bias=True, pad_small_inputs=True)
    assert module.rpb.shape == (2, *[5] * dims)
    scripted = torch.jit.script(module)
    for size, inside in ((spatial, spatial), (small, padded)):
        x = torch.randn(2, *size, 8)
        full = torch.zeros(2, *inside, 8)
        full[:, : size[0]] = x
        qkv = module.qkv(full).view(2, *inside, 3, 2, 4)
        y = function(qkv, 3, dilation=(2, 1, 1)[:dims], rpb=module.rpb)[:, : size[0]]
        expected = module.proj(y.reshape(2, *size, 8))
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(scripted(x), expected)
    with pytest.raises(
        ValueError, match=rf"x: expected \[B, {'D, H, W' if dims == 3 else 'L'}, emb"
    ):
        module(x[0])


def test_the_old_name_of_the_channels_is_accepted():
    module = NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3)
    assert module.qkv.in_features == 8


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_dropout_of_the_probabilities_takes_the_unfused_pieces_in_training(scripted, caplog):
    modules._log_unfused.cache_clear()
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True, attn_drop=1.0)
    NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5)
    assert [record.message for record in caplog.records] == [
        "attn_drop > 0: training computes attention unfused, with all probabilities"
    ]
    same = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    same.load_state_dict(module.state_dict())
    run = torch.jit.script(module) if scripted else module
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(run(x), module.proj.bias.expand(2, 5, 6, 8))
    run.eval()
    assert torch.equal(run(x), same(x))
    run.train()
    module.attn_drop.p = 1e-9  # keeps all; the unfused pieces then give the same
    if not scripted:
        torch.testing.assert_close(module(x), same(x))


def test_a_scale_of_zero_is_honoured():
    assert NeighborhoodAttention2D(8, 2, 3, qk_scale=0.0).scale == 0.0


@pytest.mark.parametrize("size", [(4, 5), (4, 9), (7, 2)])
def test_small_maps_are_padded_right_and_bottom_before_the_projection(size):
    module = NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True, pad_small_inputs=True)
    module = module.double()
    torch.nn.init.normal_(module.qkv.bias)  # padding is attended to, with the bias as its key
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    h, w = (max(n, 6) for n in size)
    padded = torch.zeros(1, h, w, 8, dtype=torch.float64)
    padded[:, : size[0], : size[1]] = x
    qkv = module.qkv(padded).view(1, h, w, 3, 2, 4)
    y = na2d_qkvpacked(qkv, 3, dilation=2, rpb=module.rpb)[:, : size[0], : size[1]]
    torch.testing.assert_close(module(x), module.proj(y.reshape(1, *size, 8)))


def test_a_large_map_is_not_padded():
    options = {"dilation": 2, "rel_pos_bias": True}
    module = NeighborhoodAttention2D(8, 2, 3, pad_small_inputs=True, **options)
    strict = NeighborhoodAttention2D(8, 2, 3, **options)
    strict.load_state_dict(module.state_dict())
    x = torch.randn(1, 6, 7, 8)
    assert torch.equal(module(x), strict(x))


def test_the_bias_stays_fp32_under_autocast():
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        qkv = module.qkv(x).view(1, 5, 5, 3, 2, 4)
        expected = module.proj(na2d_qkvpacked(qkv, 3, rpb=module.rpb).reshape(1, 5, 5, 8))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert module.rpb.grad.dtype == torch.float32
    assert module.rpb.grad.any()


@pytest.mark.parametrize("rel_pos_bias", [True, False])
def test_torchscript_computes_the_same_and_saves(rel_pos_bias):
    module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=rel_pos_bias, pad_small_inputs=True)
    scripted = torch.jit.script(module)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for size in ((2, 5), (6, 7)):
        x = torch.randn(2, *size, 8)
        assert torch.equal(scripted(x), module(x))
        assert torch.equal(loaded(x), module(x))


def test_a_state_dict_round_trip_changes_nothing():
    first, second = (NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, 5, 8)
    assert torch.equal(first(x), second(x))


def test_dropout_of_the_output_acts_in_training_alone():
    module = NeighborhoodAttention2D(8, 2, 3, proj_drop=1.0)
    torch.nn.init.normal_(module.proj.bias)
    x = torch.randn(1, 5, 5, 8)
    assert not module(x).any()
    assert module.eval()(x).all()


def test_the_backend_may_be_set_after_construction(device):
    module = NeighborhoodAttention2D(8, 2, 3, backend="reference", dtype=torch.float64)
    module = module.to(device)
    x = torch.randn(1, 5, 5, 8, dtype=torch.float64, device=device)
    module(x)
    module.backend = "fused"
    with pytest.raises(NotImplementedError, match="backend='fused'"):
        module(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, r"num_heads=3: expected a divisor of embed_dim=8"),
        ({"num_heads": 0}, ValueError, r"num_heads=0: expected a divisor of embed_dim=8"),
        ({"embed_dim": 0}, ValueError, r"embed_dim=0"),
        ({"kernel_size": 0}, ValueError, r"kernel_size=\(0, 0\): expected at least 1"),
        ({"kernel_size": 2.5}, TypeError, r"kernel_size=2.5: expected int"),
        ({"stride": 4}, ValueError, r"stride=\(4, 4\): expected 1 <= stride <= kernel_size"),
        ({"dilation": (1, 0)}, ValueError, r"dilation=\(1, 0\): expected at least 1"),
        ({"is_causal": None}, TypeError, r"is_causal=None: expected bool"),
        ({"qk_scale": "x"}, TypeError, r"qk_scale='x': expected a number"),
        ({"embed_dim": 8.0}, TypeError, r"embed_dim=8.0: expected an int"),
        ({"num_heads": None}, TypeError, r"num_heads=None: expected an int"),
        ({"proj_drop": "0.1"}, TypeError, r"proj_drop='0.1': expected a probability"),
        ({"attn_drop": 1.5}, ValueError, r"attn_drop=1.5: expected a probability"),
        ({"proj_drop": -1}, ValueError, r"proj_drop=-1: expected a probability"),
        ({"dim": 8}, TypeError, r"dim=8: expected embed_dim or dim, not both"),
        ({"backend": "cutlass"}, ValueError, r"backend='cutlass': expected None or one of"),
    ],
)
def test_it_names_the_setting_that_breaks_a_rule(options, error, message):
    with pytest.raises(error, match=message):
        NeighborhoodAttention2D(**{"embed_dim": 8, "num_heads": 2, "kernel_size": 3} | options)


def test_it_names_the_input_that_breaks_a_rule():
    module = NeighborhoodAttention2D(8, 2, 3, dilation=2)
    for shape in ((5, 6, 8), (1, 7, 6, 4)):
        with pytest.raises(ValueError, match=r"x: expected \[B, H, W, embed_dim=8\], got shape"):
            module(torch.randn(shape))
    with pytest.raises(ValueError, match=r"x: expected at least .*\(2, 2\).*\[1, 5, 6, 8\]"):
        module(torch.randn(1, 5, 6, 8))
