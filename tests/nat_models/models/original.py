"""The original models, restated in plain PyTorch from their definitions.

Each function takes a state dict in the original code's layout and is written for clarity: an axis's
windows are listed query by query, and nothing is shared with the package.
"""

import math

import torch
from torch.nn import functional as F


def nat(sd, images, num_heads, kernel_size, dilations):
    """Logits of NAT and DiNAT. `dilations` are per stage and block."""
    x = images
    for i in range(2):
        weight, bias = (sd[f"patch_embed.proj.{i}.{leaf}"] for leaf in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride=2, padding=1)
    x = norm(sd, "patch_embed.norm", x.permute(0, 2, 3, 1))
    for i, stage in enumerate(dilations):
        for j, dilation in enumerate(stage):
            x = block(sd, f"levels.{i}.blocks.{j}", x, num_heads[i], kernel_size, dilation)
        if i < len(dilations) - 1:
            weight = sd[f"levels.{i}.downsample.reduction.weight"]
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)
            x = norm(sd, f"levels.{i}.downsample.norm", x)
    return linear(sd, "head", norm(sd, "norm", x).mean((1, 2)))


def dinat_s(sd, images, num_heads, kernel_size, dilations):
    """Logits of DiNAT_s. `dilations` are per stage and block."""
    height, width = images.shape[2:]
    x = F.pad(images, (0, -width % 4, 0, -height % 4))
    x = patches(sd, x, 4)
    for i, stage in enumerate(dilations):
        for j, dilation in enumerate(stage):
            x = block(sd, f"layers.{i}.blocks.{j}", x, num_heads[i], kernel_size, dilation)
        if i < len(dilations) - 1:
            height, width = x.shape[1:3]
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
            four = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(sd, f"layers.{i}.downsample.norm", torch.cat(four, -1))
            x = linear(sd, f"layers.{i}.downsample.reduction", x)
    return linear(sd, "head", norm(sd, "norm", x).mean((1, 2)))


def isotropic(sd, images, num_heads, kernel_size, dilations):
    """Logits of isotropic NAT and DiNAT, or with `kernel_size=None` of ViT-RPB."""
    x = patches(sd, images, 16)
    for i, dilation in enumerate(dilations):
        x = block(sd, f"layers.{i}", x, num_heads, kernel_size, dilation)
    return linear(sd, "head", norm(sd, "norm", x).mean((1, 2)))


def norm(sd, name, x):
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-5)


def linear(sd, name, x):
    return F.linear(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"))


def patches(sd, images, size):
    """Non-overlapping patches, flattened and projected."""
    weight, bias = sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"]
    x = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, H, W, size, size]
    x = torch.einsum("bchwij,dcij->bhwd", x, weight) + bias
    return norm(sd, "patch_embed.norm", x)


def block(sd, name, x, heads, kernel_size, dilation):
    y = norm(sd, f"{name}.norm1", x)
    if kernel_size is None:
        y = global_attention(sd, f"{name}.attn", y, heads)
    else:
        y = attention(sd, f"{name}.attn", y, heads, kernel_size, dilation)
    x = x + y * sd.get(f"{name}.gamma1", 1)
    y = linear(sd, f"{name}.mlp.fc1", norm(sd, f"{name}.norm2", x))
    y = linear(sd, f"{name}.mlp.fc2", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
    return x + y * sd.get(f"{name}.gamma2", 1)


def attention(sd, name, x, heads, kernel_size, dilation):
    """Neighborhood attention; a map too small for the window is padded, the padding attended to."""
    height, width = x.shape[1:3]
    least = kernel_size * dilation
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    query, key, value = linear(sd, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(3)
    (rows, bias_rows), (columns, bias_columns) = (
        axis_windows(size, kernel_size, dilation) for size in x.shape[1:3]
    )
    key, value = (near[:, rows][:, :, :, columns] for near in (key, value))  # [B, H, k, W, k, N, D]
    bias = sd[f"{name}.rpb"][:, bias_rows][:, :, :, bias_columns]  # [N, H, k, W, k]
    logits = torch.einsum("bhwnd,bhiwjnd->bnhiwj", query, key) / query.shape[-1] ** 0.5 + bias
    logits = logits.permute(0, 1, 2, 4, 3, 5)  # [B, N, H, W, k, k]
    weights = logits.flatten(4).softmax(-1).unflatten(-1, logits.shape[4:])
    x = torch.einsum("bnhwij,bhiwjnd->bhwnd", weights, value).flatten(3)
    return linear(sd, f"{name}.proj", x[:, :height, :width])


def axis_windows(length, kernel_size, dilation):
    """The keys that each query of an axis attends to, and their places in the bias table."""
    keys, places = [], []
    for query in range(length):
        group = range(query % dilation, length, dilation)
        first = min(max(query // dilation - kernel_size // 2, 0), len(group) - kernel_size)
        keys.append(list(group[first : first + kernel_size]))
        places.append([(key - query) // dilation + kernel_size - 1 for key in keys[-1]])
    return torch.tensor(keys), torch.tensor(places)


def global_attention(sd, name, x, heads):
    """Attention of all tokens to all, with a bias by their distance, key minus query."""
    height, width = x.shape[1:3]
    query, key, value = linear(sd, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).unbind(3)
    row, column = torch.arange(height), torch.arange(width)
    rows = (row[None, :] - row[:, None] + height - 1)[:, None, :, None]
    columns = (column[None, :] - column[:, None] + width - 1)[None, :, None, :]
    logits = torch.einsum("bhwnd,bijnd->bnhwij", query, key) / query.shape[-1] ** 0.5
    logits = logits + sd[f"{name}.rpb"][:, rows, columns]
    weights = logits.flatten(4).softmax(-1).unflatten(-1, (height, width))
    x = torch.einsum("bnhwij,bijnd->bhwnd", weights, value).flatten(3)
    return linear(sd, f"{name}.proj", x)
