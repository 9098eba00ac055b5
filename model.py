"""The networks: one-step DiT generator (A.2), encoders (A.3, A.5), VAE, and how they are loaded.

Module and config names follow the authors' release, so that a published `metadata.json` builds the
model as it stands. Axes in shape comments: n samples, c channels, h w pixels, t tokens (in-context
ones first), d width. What all scripts share is at the end.
"""
import argparse
import contextlib
import ctypes
import datetime
import hashlib
import inspect
import json
import math
import mmap
import os
import pickle
import re
import shutil
import sys
import time
from collections import OrderedDict
from pathlib import Path

import msgpack
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import (PyTorchModelHubMixin, constants, errors, hf_hub_download,
                             try_to_load_from_cache)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from drift import float32_at_least, multi_scale_features

CHECKPOINT = dict(use_reentrant=False, preserve_rng_state=False)  # of torch.utils.checkpoint

MODEL_CARD = """---
{{ card_data }}
---
One-step image generation by [drifting]({{ paper_url }}), with the project's scripts. A generator:
`python sample.py --ckpt hf://USER/REPO`; an encoder: `python train.py --encoder hf://USER/REPO`.
"""


class Pretrained(PyTorchModelHubMixin, library_name="drifting", license="mit",
                 tags=["drifting", "one-step-generation"],
                 paper_url="https://arxiv.org/abs/2602.04770", model_card_template=MODEL_CARD):
    """save_pretrained, from_pretrained, push_to_hub of huggingface_hub, strict about weights.

    config.json holds the constructor's arguments; `model_type`, by which the class is found again:
    "generator", or its name in ENCODERS, and what is not there cannot be saved; and `origin`: of a
    trained network the names of its classes and the sha256 of the VAE of its latents.
    """

    origin = {}

    def save_pretrained(self, save_directory, **options):
        names = {cls: name for name, cls in [("generator", Generator), *ENCODERS.items()]}
        config = {**(self._hub_mixin_config or {}), "model_type": names[type(self)]}
        if self.origin:
            config["origin"] = self.origin
        return super().save_pretrained(save_directory, **{**options, "config": config})

    @classmethod
    def _from_pretrained(cls, **options):
        return super()._from_pretrained(**{**options, "strict": True})


# Table 8. XXS to S are ours, for small images on small machines. XXS is for the digits, whose 8 x 8
# pixels are one token: attention has nothing to do there, and blocks are MLPs under a condition.
GENERATOR_SIZES = {
    "XXS": dict(hidden_size=128, depth=3, num_heads=1, n_cls_tokens=0),
    "XS": dict(hidden_size=128, depth=3, num_heads=4, n_cls_tokens=1),
    "S": dict(hidden_size=384, depth=10, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),  # W-Flow's
}


# --------------------------------------------------------------------------------------------
# Generator

class Generator(nn.Module, Pretrained):
    """DiT from noise to sample in one forward pass (A.2, Table 8), given class, alpha and styles.

    Sizes: `Generator(**GENERATOR_SIZES["B"], ...)`. The defaults are those of latents 32x32x4.
    Styles are extra, discrete noise: `noise_coords` times one of `noise_classes` embeddings.
    Raises UsageError for sizes that do not divide.
    """

    def __init__(self, input_size=32, in_channels=4, out_channels=None, patch_size=2,
                 hidden_size=768, depth=12, num_heads=12, mlp_ratio=4.0, cond_dim=None,
                 num_classes=1000, noise_classes=64, noise_coords=32, n_cls_tokens=16,
                 attn_fp32=False):
        super().__init__()
        if input_size % patch_size or hidden_size % 4 or hidden_size % (2 * num_heads):
            raise UsageError(f"patch_size {patch_size} must divide input_size {input_size}, 4 and "
                             f"twice num_heads {num_heads} must divide hidden_size {hidden_size}")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.num_classes = num_classes
        self.noise_classes, self.noise_coords = noise_classes, noise_coords
        self.checkpoint_blocks = False  # True: a third more work, activations 1/20 of the memory
        cond_dim = cond_dim or hidden_size
        grid = input_size // patch_size
        with torch.device("cpu"):  # under "meta" too: the rotary table is in no file
            positions = sincos_2d(grid, hidden_size)
            rope = rotary_table(n_cls_tokens + grid**2, hidden_size // num_heads)

        self.class_embed = Embedding(num_classes, cond_dim)
        self.style_embed = nn.Parameter(torch.empty(noise_coords, noise_classes, cond_dim))
        self.alpha_embed = nn.Sequential(
            nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.alpha_norm = RMSNorm(cond_dim)

        self.patch_embed = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.pos_embed = nn.Parameter(positions[None])
        self.cls_proj = nn.Linear(cond_dim, hidden_size)
        self.cls_embed = nn.Parameter(torch.empty(1, n_cls_tokens, hidden_size))
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, cond_dim, attn_fp32) for _ in range(depth))
        self.final_norm = RMSNorm(hidden_size)
        self.final_adaln = nn.Linear(cond_dim, 2 * hidden_size)
        self.final_linear = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.register_buffer("rope", rope, persistent=False)
        if not self.cls_embed.is_meta:
            self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_embed.weight, self.style_embed, self.cls_embed,
                      self.alpha_embed[0].weight, self.alpha_embed[2].weight):
            nn.init.normal_(table, std=0.02)
        for layer in [self.final_linear, self.final_adaln] + [block.adaln for block in self.blocks]:
            nn.init.zeros_(layer.weight)  # adaLN-zero

    def condition(self, class_labels, cfg_scale, style_indices):
        """Condition [n, cond_dim] in float32: class + sum of styles + 0.02 norm(MLP(alpha))."""
        device = cfg_scale.device
        with torch.autocast(device.type, enabled=False):
            frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=device))
            angles = cfg_scale.to(self.pos_embed.dtype)[:, None] * frequencies      # n 128
            sinusoid = torch.cat([angles.cos(), angles.sin()], 1)                   # n 256
            alpha = self.alpha_norm(self.alpha_embed(sinusoid))                     # n d
            # One lookup in all tables: unlike that of indexing, its backward pass adds up in a
            # fixed order on a CPU, so that a run can be repeated to the bit.
            first_rows = self.noise_classes * torch.arange(self.noise_coords, device=device)
            tables = self.style_embed.flatten(0, 1)
            styles = F.embedding(style_indices + first_rows, tables).sum(1)         # n d
            return self.class_embed(class_labels) + styles + 0.02 * alpha

    def forward(self, noise, class_labels, cfg_scale, style_indices):
        """noise [n, c, h, w], class_labels [n], cfg_scale [n] (alpha), style_indices
        [n, noise_coords] -> samples [n, c, h, w]."""
        p = self.patch_size
        cond = self.condition(class_labels, cfg_scale, style_indices)               # n d
        x = rearrange(noise, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)        # n t (p q c)
        x = self.patch_embed(x)
        x = x + self.pos_embed.to(x.dtype)                                          # n t d
        in_context = self.cls_proj(cond)[:, None] + self.cls_embed                  # n 16 d
        x = torch.cat([in_context.to(x.dtype), x], 1)                               # n (16 + t) d
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, cond, self.rope, **CHECKPOINT)
            else:
                x = block(x, cond, self.rope)
        shift, scale = modulation(self.final_adaln, cond, 2)
        x = self.final_norm(x[:, self.cls_embed.shape[1]:])
        x = self.final_linear(modulate(x, shift, scale))                            # n t (p q c)
        h = self.input_size // p
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", p=p, q=p, h=h)


class Block(nn.Module):
    """Transformer block: adaLN-zero, attention (q and k normalised in each head), SwiGLU."""

    def __init__(self, width, num_heads, mlp_ratio, cond_dim, attn_fp32):
        super().__init__()
        # SwiGLU has three matrices where an MLP has two: 2/3 keeps the number of parameters.
        hidden = math.ceil(int(mlp_ratio * width * 2 / 3) / 32) * 32
        self.num_heads = num_heads
        self.attn_fp32 = attn_fp32
        self.adaln = nn.Linear(cond_dim, 6 * width)
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = nn.Linear(width, width)
        self.norm2 = RMSNorm(width)
        self.mlp_gate = nn.Linear(width, hidden)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x, cond, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaln, cond, 6)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1.to(x.dtype) * self.attention(h, rope)                         # n t d
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2.to(x.dtype) * self.mlp_out(F.silu(self.mlp_gate(h)) * self.mlp_in(h))

    def attention(self, x, rope):
        q, k, v = rearrange(self.qkv(x), "n t (three heads d) -> three n heads t d",
                            three=3, heads=self.num_heads)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        if self.attn_fp32:
            q, k, v = float32_at_least(q), float32_at_least(k), float32_at_least(v)
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q, k, v)                             # n heads t d
        return self.proj(rearrange(x, "n heads t d -> n t (heads d)"))


class Embedding(nn.Embedding):
    """Not drawn without memory: a normal_() on "meta" would import torch._dynamo, two seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """In its input's type: autocast on CUDA would return float32, in twice the memory."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def modulation(linear, cond, chunks):
    """adaLN: SiLU, then linear, in float32 even under autocast -> `chunks` tensors [n, 1, d]."""
    with torch.autocast(cond.device.type, enabled=False):
        return linear(F.silu(cond))[:, None].chunk(chunks, -1)


def modulate(x, shift, scale):
    return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)


def rotary_table(length, head_dim):
    """Angles of a 1-D sequence, in-context tokens included: cos, sin [2, length, head_dim / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Rotary positions of x [n, heads, t, d]: channel i turns with channel i + d / 2."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def sincos_2d(grid, width):
    """Positions [grid^2, width]: a quarter each of sin and cos of the column, then of the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    one_axis = torch.cat([angles.sin(), angles.cos()], 1)                           # grid d/2
    return torch.cat([one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, 0)], 1)


# --------------------------------------------------------------------------------------------
# Encoder

class MAE(nn.Module, Pretrained):
    """ResNet masked autoencoder (A.3). Its encoder's features are the space where samples drift.

    Pixel models patchify first: `input_patch_size` 8 turns 256x256x3 into 32x32x192. layers: the
    residual blocks of each stage; widths double. patch_size: side of a masking patch.
    """

    def __init__(self, in_channels=4, base_channels=256, layers=(3, 4, 6, 3), patch_size=2,
                 input_patch_size=1, num_classes=1000):
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.patch_size, self.input_patch_size = patch_size, input_patch_size
        channels = in_channels * input_patch_size**2
        self.encoder = ResNetEncoder(channels, base_channels, layers)
        self.decoder = UNetDecoder(channels, base_channels, len(layers))
        self.fc = nn.Linear(base_channels * 2 ** (len(layers) - 1), num_classes)

    def patchify(self, x):
        p = self.input_patch_size
        return rearrange(x, "n c (h p) (w q) -> n (p q c) h w", p=p, q=p)

    def forward(self, x, mask, labels):
        """x [n, c, h, w], mask [n, h', w'] on the grid of masking patches (1: hidden), labels [n].

        Returns reconstruction (patchified), class logits [n, classes], and per image: the squared
        error at hidden positions (sum over channels, mean over positions), and the cross-entropy.
        """
        x = self.patchify(x)                                                        # n c 32 32
        p = self.patch_size
        hidden = mask.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None]      # n 1 32 32
        maps = self.encoder(x * (1 - hidden))
        recon = float32_at_least(self.decoder(maps))                                # n c 32 32
        pooled = maps[f"layer{self.encoder.num_stages}"].mean((2, 3))
        logits = float32_at_least(self.fc(pooled))                                  # n classes
        error = ((recon - x).square() * hidden).sum((1, 2, 3))
        error = error / hidden.sum((1, 2, 3)).clamp_min(1)                          # n
        return recon, logits, error, F.cross_entropy(logits, labels, reduction="none")

    def features(self, x):
        """x [n, c, h, w], not masked -> {name: [n, T, C]} (A.5): `norm_x` and those of every map.

        Computed in the weights' type: with bfloat16 weights maps are bfloat16, the statistics of
        them float32.
        """
        x = self.patchify(x)
        norm_x = (float32_at_least(x).square().mean((2, 3)) + 1e-6).sqrt()          # n c
        maps = self.encoder(x.to(self.encoder.conv1.weight.dtype))
        return {"norm_x": norm_x[:, None], **multi_scale_features(maps)}


class ResNetEncoder(nn.Module):
    """Basic blocks in stages at full, 1/2, 1/4, ... resolution, a GroupNorm after each stage."""

    def __init__(self, in_channels, width, layers):
        super().__init__()
        self.num_stages = len(layers)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.gn1 = GroupNorm(width)
        self.stages = nn.ModuleList()
        c_in = width
        for i, depth in enumerate(layers):
            c_out = width * 2**i
            blocks = [BasicBlock(c_in, c_out, stride=2 if i > 0 else 1)]
            blocks += [BasicBlock(c_out, c_out, stride=1) for _ in range(depth - 1)]
            self.stages.append(nn.ModuleDict({"layers": nn.ModuleList(blocks)}))
            self.add_module(f"layer{i + 1}_norm", GroupNorm(c_out))
            c_in = c_out

    def forward(self, x):
        """x [n, c, h, w] -> maps {name: [n, C, H, W]}: conv1; layerI_blkK, the output of every
        second block; layerI, a stage's output, normalised, which feeds the next stage."""
        x = F.relu(self.gn1(self.conv1(x)))
        maps = {"conv1": x}
        for i, stage in enumerate(self.stages, 1):
            for k, block in enumerate(stage["layers"], 1):
                x = block(x)
                if k % 2 == 0:
                    maps[f"layer{i}_blk{k}"] = x
            x = self.get_submodule(f"layer{i}_norm")(x)
            maps[f"layer{i}"] = x
        return maps


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.gn1 = GroupNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.gn2 = GroupNorm(c_out)
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.proj_conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.proj_gn = GroupNorm(c_out)

    def forward(self, x):
        skip = self.proj_gn(self.proj_conv(x)) if self.projects else x
        x = F.relu(self.gn1(self.conv1(x)))
        return F.relu(self.gn2(self.conv2(x)) + skip)


class UNetDecoder(nn.Module):
    """Back up through the stages: resize to the skip's size, concatenate, normalise, convolve."""

    def __init__(self, out_channels, width, num_stages):
        super().__init__()
        self.num_stages = num_stages
        widths = [width] + [width * 2**i for i in range(num_stages)]  # conv1, layer1, layer2, ...
        self.bridge = conv_gn_relu(widths[-1], widths[-1])
        for i in range(num_stages, 0, -1):
            both = widths[i] + widths[i - 1]
            self.add_module(f"up{i}{i - 1}", nn.ModuleDict({
                "concat_norm_fn": GroupNorm(both),
                "proj": conv_gn_relu(both, widths[i - 1]),
                "refine": conv_gn_relu(widths[i - 1], widths[i - 1])}))
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps):
        x = self.bridge(maps[f"layer{self.num_stages}"])
        for i in range(self.num_stages, 0, -1):
            up = self.get_submodule(f"up{i}{i - 1}")
            skip = maps[f"layer{i - 1}" if i > 1 else "conv1"]
            x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = up["concat_norm_fn"](torch.cat([x, skip], 1))
            x = up["refine"](up["proj"](x))
        return self.head(x)


def conv_gn_relu(c_in, c_out):
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, gn=GroupNorm(c_out), relu=nn.ReLU()))


class GroupNorm(nn.GroupNorm):
    """32 groups, or the most that divide the channels. In its input's type, as RMSNorm."""

    def __init__(self, channels):
        groups = max(g for g in range(1, 33) if channels % g == 0)
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


# --------------------------------------------------------------------------------------------
# Networks of others: ConvNeXt-V2 and ResNet-50, whose features are of pixels, and the SD-VAE

def imagenet_input(x, image_size):
    """Images [n, 3, h, w] in [-1, 1] as networks for ImageNet take them: standardised.

    They are resized to image_size, unless that is None.
    """
    # By plain numbers: a tensor of them would be copied to the GPU in every call, which waits.
    channels = zip(float32_at_least(x).unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.stack([((channel + 1) / 2 - mean) / std for channel, mean, std in channels], 1)
    if image_size is None:
        return x
    return F.interpolate(x, (image_size, image_size), mode="bilinear", antialias=True)


class ConvNeXtV2(nn.Module, Pretrained):
    """ConvNeXt-V2, an encoder of pixels beside the MAE (A.5; P: FID 9.35 -> 3.70).

    Parameters and config keys have the names that transformers gives them in public checkpoints.
    """

    def __init__(self, depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024), num_channels=3,
                 patch_size=4, image_size=224, layer_norm_eps=1e-12):
        super().__init__()
        self.in_channels, self.image_size = num_channels, image_size
        self.embeddings = nn.ModuleDict({
            "patch_embeddings": nn.Conv2d(num_channels, hidden_sizes[0], patch_size, patch_size),
            "layernorm": ChannelNorm(hidden_sizes[0])})
        stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, hidden_sizes)):
            layers = nn.ModuleList(ConvNeXtBlock(width) for _ in range(depth))
            stages.append(nn.ModuleDict({"layers": layers}))
            if i > 0:
                before = hidden_sizes[i - 1]
                stages[i]["downsampling_layer"] = nn.Sequential(
                    ChannelNorm(before), nn.Conv2d(before, width, 2, 2))
        self.encoder = nn.ModuleDict({"stages": stages})
        self.layernorm = nn.LayerNorm(hidden_sizes[-1], eps=layer_norm_eps)

    def features(self, x):
        """x [n, 3, h, w] in [-1, 1], of any size -> {name: [n, T, C]}; `convenxt` as the release.

        A stage's map, each position normalised over its channels, from the second stage on; means
        and stds of all four, the last one's std once more as `global_std`; and `global_mean`, the
        final norm of the mean of the last map as it is.
        """
        x = imagenet_input(x, self.image_size)
        embed = self.embeddings["patch_embeddings"]
        x = self.embeddings["layernorm"](embed(x.to(embed.weight.dtype)))           # n 128 56 56
        features = {}
        for i, stage in enumerate(self.encoder["stages"]):
            if i > 0:
                x = stage["downsampling_layer"](x)
            for block in stage["layers"]:
                x = block(x)                                                        # n c h w
            y = rearrange(float32_at_least(x), "n c h w -> n (h w) c")
            mean, std = mean_and_std(y, 2)
            y = (y - mean) / (std + 1e-3)                                           # n T c
            if i > 0:
                features[f"convenxt_stage_{i}"] = y
            mean, std = mean_and_std(y, 1)                                          # n 1 c
            features[f"convenxt_stage_{i}_mean"] = mean
            features[f"convenxt_stage_{i}_std"] = std
        norm = self.layernorm  # of a vector: in float32 whatever the weights are
        weight, bias = float32_at_least(norm.weight), float32_at_least(norm.bias)
        last = float32_at_least(x).mean((2, 3), keepdim=True).flatten(2).mT         # n 1 c
        features["global_mean"] = F.layer_norm(last, norm.normalized_shape, weight, bias, norm.eps)
        features["global_std"] = std
        return features


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, and an MLP whose channels are weighted by their norms over space."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        zeros = torch.zeros(1, 1, 1, 4 * width)
        self.grn = nn.ParameterDict({"weight": zeros, "bias": zeros.clone()})
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))                      # n h w c
        y = F.gelu(self.pwconv1(y))                                                 # n h w 4c
        precise = torch.promote_types(y.dtype, torch.float32)
        norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=precise)
        response = (norm / (norm.mean(3, keepdim=True) + 1e-6)).to(y.dtype)         # n 1 1 4c
        y = self.pwconv2(self.grn["weight"] * (y * response) + self.grn["bias"] + y)
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mean_and_std(x, dim):
    """Mean and biased standard deviation along one axis, which is kept."""
    mean = x.mean(dim, keepdim=True)
    return mean, ((x - mean).square().mean(dim, keepdim=True) + 1e-6).sqrt()


class ResNet50(nn.Module, Pretrained):
    """ResNet-50, an encoder of pixels with which no MAE is needed (Table 3: MoCo-v2 8.41 FID).

    Parameters have torchvision's names; its classifier is left out. image_size: side to which
    images are resized, None: no resizing. It is always in eval mode, as BatchNorm's statistics
    are those of its training.
    """

    def __init__(self, image_size=224):
        super().__init__()
        self.in_channels, self.image_size = 3, image_size
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = bottlenecks(3, 64, 64, stride=1)
        self.layer2 = bottlenecks(4, 256, 128, stride=2)
        self.layer3 = bottlenecks(6, 512, 256, stride=2)
        self.layer4 = bottlenecks(3, 1024, 512, stride=2)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def features(self, x):
        """x [n, 3, h, w] in [-1, 1], of any size -> {name: [n, T, C]} of the four stages' maps."""
        x = imagenet_input(x, self.image_size).to(self.conv1.weight.dtype)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)                                                # n 64 56 56
        maps = {}
        for i, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            x = stage(x)
            maps[f"resnet_layer{i}"] = x  # an MAE beside it has a `layer1` too
        return multi_scale_features(maps)


def bottlenecks(depth, c_in, width, stride):
    blocks = [Bottleneck(4 * width, width, stride=1) for _ in range(depth - 1)]
    return nn.Sequential(Bottleneck(c_in, width, stride), *blocks)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride), 1x1 convolution; four times `width` channels come out."""

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()  # without layers: the identity
        if c_in != 4 * width:
            self.downsample.append(nn.Conv2d(c_in, 4 * width, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


LATENT_SCALE = 0.18215  # latents are this times the VAE's, so that their variance is about 1
SD_VAE = "hf://stabilityai/sd-vae-ft-mse"  # what all --vae options mean by themselves
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
VAE_FORMS = (VAE_FILES, ("config.json", "diffusion_pytorch_model.bin"))


def load_vae(path=SD_VAE, device="cpu", chunk=16, wanted=None):
    """The SD-VAE (diffusers' AutoencoderKL) of a folder or the Hub, frozen; bfloat16 on a GPU.

    chunk: images in work at a time, which bounds the memory whatever their number: 2 GB an image
    where gradients are kept, 0.2 GB where not. wanted: sha256 of the weights that made the latents
    at hand. Raises UsageError for what is no such VAE.
    """
    weights = find_files(path, VAE_FORMS)[1]
    if wanted not in (None, sha256(weights)):
        raise UsageError(f"--vae {path} is not the VAE that made the latents here: its sha256 is "
                         f"{sha256(weights)}, that of theirs {wanted}")
    from diffusers import AutoencoderKL  # takes three seconds: only who decodes waits for it
    from diffusers.utils import logging
    logging.set_verbosity_error()
    safe = weights.suffix == ".safetensors"
    try:
        net, misfits = AutoencoderKL.from_pretrained(
            weights.parent, use_safetensors=safe, low_cpu_mem_usage=False, output_loading_info=True)
    except Exception as error:  # diffusers has many kinds for a folder that is not whole
        raise UsageError(f"{weights}: no AutoencoderKL of diffusers ({error})") from error
    if any(misfits.values()):  # diffusers would fill them with random numbers
        raise UsageError(f"{weights}: not the weights of its config ({str(misfits):.200})")
    if net.config.scaling_factor != LATENT_SCALE:
        raise UsageError(f"{path}: its latents are scaled by {net.config.scaling_factor}, "
                         f"these models' by {LATENT_SCALE}")
    vae = VAE(net, chunk)
    vae.weights_file = weights
    on_gpu = torch.device(device).type == "cuda"
    return vae.to(device, torch.bfloat16 if on_gpu else torch.float32)


class VAE(nn.Module):
    """Images [n, 3, 8h, 8w] in [-1, 1] <-> latents [n, 4, h, w], `chunk` of them at a time."""

    def __init__(self, net, chunk=16):
        super().__init__()
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.chunk = chunk
        self.downsampling = 2 ** (len(net.config.block_out_channels) - 1)

    def decode(self, latents):
        """Latents -> images in float32, about in [-1, 1]. Gradients pass through."""
        # Where gradients are wanted, a chunk's activations are computed a second time, not kept.
        return torch.cat([checkpoint(self._decode, z, **CHECKPOINT)
                          for z in self._chunks(latents / LATENT_SCALE)])

    @torch.no_grad()
    def encode(self, images):
        """Images -> mean and standard deviation [n, 4, h, w] of their latents, float32."""
        posteriors = [self.net.encode(x).latent_dist for x in self._chunks(images)]
        mean = torch.cat([posterior.mean.float() for posterior in posteriors])
        std = torch.cat([posterior.std.float() for posterior in posteriors])
        return mean * LATENT_SCALE, std * LATENT_SCALE

    def _decode(self, z):
        return self.net.decode(z).sample.float()

    def _chunks(self, x):
        # On a CPU one at a time: that is faster, and an image's bits do not depend on the others.
        size = 1 if x.device.type == "cpu" else self.chunk
        return x.to(self.net.dtype, memory_format=torch.channels_last).split(size)


# --------------------------------------------------------------------------------------------
# Loading: checkpoints of ours, artifacts of the authors', transformers'; in a folder or on the Hub

# A new encoder is a class derived from nn.Module and Pretrained, with `in_channels` and `features`
# as MAE has them, and an entry here. YOURS(...).save_pretrained(FOLDER) then writes weights and
# the constructor's arguments (numbers, lists) for --encoder FOLDER and load_encoder to read.
# Images come in float32, weights are bfloat16 under --bf16: cast the images to their type.
# Several encoders must name features apart; `global` is that of the samples themselves.
ENCODERS = {"mae": MAE, "convnextv2": ConvNeXtV2, "resnet50": ResNet50}
BUILT_FROM_FILES = (Generator, MAE, ConvNeXtV2, ResNet50)  # all of their tensors are in files

# hf://NAME: the authors' weights on the Hub, and W-Flow's, which are single files.
PUBLISHED = {place.split("/")[-1]: f"Goodeat/drifting/models/{place}" for place in (
    "gen/jax/latent_L_sota", "gen/jax/latent_B_sota", "gen/jax/pixel_L_sota",
    "gen/jax/pixel_B_sota", "gen/jax/ablation",
    "mae/jax/mae_latent_640", "mae/jax/mae_pixel_640", "mae/jax/mae_latent_256")}
PUBLISHED |= {f"wflow_{name}": f"jiaqihan99/W-Flow/checkpoints/latent_{file}.pt"
              for name, file in {
    "ablation": "ablation_ot/state_00030000", "B": "sota_B_ot/state_00200000",
    "L": "sota_L_ot/state_00200000", "XL": "sota_XL_ot/state_00180000"}.items()}

# What describes a model and what holds its weights, in the order in which they are looked for:
# the authors' artifact; our files, or transformers'; before safetensors; the authors' older names.
FLAX_FILES = ("metadata.json", "ema_params.msgpack")
OUR_FILES = ("config.json", "model.safetensors")
MODEL_FILES = (FLAX_FILES, OUR_FILES, ("config.json", "pytorch_model.bin"),
               ("ema_model.metadata.json", "ema_model.msgpack"))
SINGLE_FILES = (".pt", ".pth", ".pth.tar", ".safetensors")  # W-Flow's, and those of a ResNet50


def load_generator(path, keep_converted=True):
    """Generator in eval mode and float32.

    path: a run or checkpoint folder, a folder of the authors' artifact, W-Flow's state_*.pt or its
    folder, or on the Hub hf://NAME (one of PUBLISHED) or hf://USER/REPO[/SUBFOLDER][@REVISION].
    keep_converted: a download that is no safetensors is kept as such too, beside the Hub's cache,
    and read from there next time.
    Raises UsageError for what cannot be had, damaged files, another kind of model, and weights
    that are not the model's one by one.
    """
    return load(path, {"generator": Generator}, keep_converted)


def load_encoder(path, keep_converted=True):
    """One of ENCODERS, as `load_generator`, or a ResNet50's file. `in_channels`: what it takes.

    A ResNet50 that leaves images at their size: {"model_type": "resnet50", "image_size": null} in
    a config.json beside its file, which is called model.safetensors or pytorch_model.bin then.
    """
    return load(path, ENCODERS, keep_converted)


def load(path, classes, keep_converted):
    files = find_files(path, MODEL_FILES)
    return read_model(*files, classes)


def read_model(description, weights, classes):
    """The model of two files, which must be one of `classes`, {kind: class}."""
    state = read_weights(weights)
    config = read_config(description, state)
    origin = config.pop("origin", {})
    kind = str(config.pop("model_type", kind_of_tensors(state)))
    if kind not in classes:
        raise UsageError(f"{description}: a model of kind {kind:.40}, wanted is "
                         f"{' or '.join(classes)}")
    if weights.suffix == ".msgpack":
        config = release_config(description, config, kind)
    elif kind == "convnextv2":
        config, state = from_transformers(config, state)
    elif kind == "resnet50":
        state = from_torchvision(weights, state)

    cls = classes[kind]
    device = "cpu"  # an encoder of yours may compute in its constructor what is in no file
    if cls in BUILT_FROM_FILES:
        check_config(description, config, cls, state)
        device = "meta"  # without memory: what was read becomes the parameters
    try:
        with torch.device(device):
            net = cls(**config)
    except UsageError as error:
        raise UsageError(f"{description}: {error}") from None
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{weights}: not the weights of its config ({error})") from None
    check_origin(description, origin, net)
    net.origin = origin
    return net.float().eval()  # float32, however they were saved


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(net):
    """sha256 of a network's tensors: which one it is, wherever it lies."""
    result = hashlib.sha256()
    for tensor in net.state_dict().values():
        result.update(tensor.cpu().contiguous().numpy())
    return result.hexdigest()


def kind_of_tensors(state):
    """Of the authors' artifacts, our first checkpoints and single files."""
    if "class_embed.weight" in state:
        return "generator"
    if any(name.endswith("layer1.0.conv1.weight") for name in state):
        return "resnet50"
    return "mae"


def read_config(file, state):
    """What a file of JSON says; a single file of weights says what its tensors tell."""
    try:
        if file.suffix == ".json":
            return dict(json.loads(file.read_text()))
        return wflow_config(state) if file.name.startswith("state_") else {}
    except (OSError, ValueError, TypeError, RecursionError, LookupError, ArithmeticError) as error:
        raise UsageError(f"{file}: damaged, or no model ({error})") from error


def check_config(file, config, cls, state):
    """Raises UsageError for what cls(**config) has no use for, before it takes time or memory.

    Sizes are axes of the tensors, or small: no other number is believed.
    """
    parameters = inspect.signature(cls).parameters
    most = max([1024, *(n for tensor in state.values() for n in tensor.shape)])
    for name, value in config.items():
        if name not in parameters:
            raise UsageError(f"{file}: {cls.__name__} has no {name} here")
        if value is None and name in ("out_channels", "cond_dim", "image_size"):
            continue
        default = parameters[name].default
        several = isinstance(default, tuple)
        values = value if several and isinstance(value, (list, tuple)) else [value]
        kinds = {float: (float, int), bool: (bool,)}.get(type(default), (int,))
        zero_is_sound = name in ("n_cls_tokens", "noise_classes", "noise_coords", "attn_fp32")
        least = 0 if zero_is_sound else 1e-12
        sound = all(type(n) in kinds and least <= n <= most for n in values)
        if not sound or len(values) > 64 or several != isinstance(value, (list, tuple)):
            raise UsageError(f"{file}: {name} {str(value):.40} is no size of these weights")


def check_origin(file, origin, net):
    """Raises UsageError for what `Pretrained` does not write there."""
    sound = isinstance(origin, dict) and origin.keys() <= {"classes", "vae"}
    names = origin.get("classes", []) if sound else []
    sound = sound and isinstance(names, list) and len(names) in (0, getattr(net, "num_classes", 0))
    if not sound or not all(isinstance(text, str) for text in [*names, origin.get("vae", "")]):
        raise UsageError(f"{file}: damaged, origin holds no names of classes and hash of a VAE")


def read_weights(file):
    """{our name: tensor}, of flax, of safetensors, or of PyTorch's format without its code."""
    try:
        if file.suffix == ".msgpack":
            return from_flax(read_flax(file))
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.name.startswith("state_"):  # mapped: the optimizer never comes into memory
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            loaded = loaded["ema_model"]
            state = {our_name(name, WFLOW_NAMES): x.detach() for name, x in loaded.items()}
            if len(state) < len(loaded):
                raise ValueError("two tensors have the same name here")
            return stack_styles(state)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        loaded = loaded.get("state_dict", loaded)
        others = [name for name, value in loaded.items() if not torch.is_tensor(value)]
        if others:
            raise ValueError(f"{str(others[0]):.40} is no tensor: save a state_dict alone")
        return {str(name): tensor.detach() for name, tensor in loaded.items()}
    except pickle.UnpicklingError as error:
        raise UsageError(f"{file}: damaged, or no weights, or objects beside them, which would be "
                         "code to run: save a state_dict alone") from error
    except Exception as error:  # each has many kinds for bytes that are not what they should be
        raise UsageError(f"{file}: damaged, or no weights ({error})") from error


def from_transformers(config, state):
    """config.json and weights of a ConvNeXt-V2 of transformers, or of a classifier, as ours.

    Classes' names, versions and dropout are left out of the config.
    """
    ours = inspect.signature(ConvNeXtV2).parameters
    config = {key: value for key, value in config.items() if key in ours}
    # In files of before May 2023 the response normalisation has gamma and beta.
    names = {"^convnextv2.": "", "grn.gamma": "grn.weight", "grn.beta": "grn.bias"}
    state = {our_name(name, names): tensor for name, tensor in state.items()
             if not name.startswith("classifier.")}
    return config, state


def from_torchvision(file, state):
    """A ResNet's tensors under torchvision's names, without prefix, classifier and projection.

    Prefixes are those of MoCo-v2 (module.encoder_q.; encoder_k. is its average) and of conversions
    of SimCLR (backbone. and the like). A projection may have a bn1 too: the network is what has a
    layer1. Raises UsageError where there are two networks.
    """
    first = "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(first) for name in state
                if name.endswith(first) and "encoder_k." not in name]
    if len(prefixes) > 1:
        raise UsageError(f"{file}: holds several networks, of which one is wanted: their names "
                         f"begin with {' and '.join(sorted(prefixes))}")
    prefix = prefixes[0] if prefixes else ""  # without a layer1 all its tensors are missed, by name
    wanted = re.compile(re.escape(prefix) + r"((conv1|bn1|layer\d)\..*)")
    matches = {name: wanted.fullmatch(name) for name in state}
    return {match[1]: state[name] for name, match in matches.items() if match}


# Of a name in W-Flow's files: a pattern, and what takes its place, in this order.
WFLOW_NAMES = {
    r"\.linear\.(weight|bias)$": r".\1", r"^model\.": "", "^cfg_embedder.fc1": "alpha_embed.0",
    "^cfg_embedder.fc2": "alpha_embed.2", "^cfg_norm": "alpha_norm", "^c_token_proj": "cls_proj",
    r"^noise_embeds\.(\d+)\.weight": r"style_embed.\1",
    r"\.attn\.": ".", r"mlp\.w1": "mlp_gate", r"mlp\.w3": "mlp_in", r"mlp\.w2": "mlp_out",
    r"final_layer\.norm_final": "final_norm", r"final_layer\.adaLN_mod\.1": "final_adaln",
    r"final_layer\.linear": "final_linear", r"adaLN_mod\.1": "adaln"}


def wflow_config(state):
    """The constructor's arguments, by the shapes of W-Flow's tensors. Latents have 4 channels."""
    styles, noise_classes, cond_dim = state["style_embed"].shape
    _, tokens, width = state["pos_embed"].shape
    patch = math.isqrt(state["patch_embed.weight"].shape[1] // 4)
    return dict(
        input_size=math.isqrt(tokens) * patch, in_channels=4, patch_size=patch,
        hidden_size=width, depth=sum(name.endswith(".qkv.weight") for name in state),
        num_heads=width // len(state["blocks.0.q_norm.weight"]), cond_dim=cond_dim,
        num_classes=len(state["class_embed.weight"]), noise_classes=noise_classes,
        noise_coords=styles, n_cls_tokens=state["cls_embed"].shape[1])


def checkpoints(run):
    """Whole `step_*` folders of a run, newest first: what is being written has another name."""
    return sorted(Path(run).glob("step_" + "[0-9]" * 8), reverse=True)


def latest_checkpoint(run):
    return next(iter(checkpoints(run)), None)


def find_files(path, forms):
    """Paths of the files of the first of the forms, pairs of names, that `path` holds.

    A single file describes itself. From the Hub only these are downloaded, under huggingface_hub's
    own settings (HF_HOME, ...).
    """
    wanted = " or ".join(weights for _, weights in forms)
    if str(path).startswith("hf://"):
        return download(str(path), forms, wanted)
    folder = latest_checkpoint(path) or Path(path)
    if folder.is_file() and folder.name.endswith(SINGLE_FILES) and forms == MODEL_FILES:
        return [folder, folder]
    if any(folder.glob("state_*.pt")):
        return [max(folder.glob("state_*.pt"))] * 2
    if (folder / "params_ema").is_dir():  # a run of the authors' code
        folder = folder / "params_ema"
    for names in forms:
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise UsageError(f"{path}: there is no {wanted} with its config, nor in its newest step_*; on "
                     "the Hub it would be hf://NAME or hf://USER/REPO")


def download(path, forms, wanted):
    name, _, revision = path.removeprefix("hf://").partition("@")
    parts = PUBLISHED.get(name, name).strip("/").split("/")
    if len(parts) < 2 or "" in parts or ".." in path:
        raise UsageError(f"{path}: neither hf://USER/REPO[/SUBFOLDER][@REVISION] nor one of "
                         f"{', '.join(PUBLISHED)}")
    if len(parts) > 2 and parts[-1].endswith(SINGLE_FILES):
        wanted = parts.pop()
        forms = [(wanted, wanted)]
    place = dict(repo_id="/".join(parts[:2]), subfolder="/".join(parts[2:]),
                 revision=revision or None)
    for names in forms:
        try:
            return [download_file(name, place) for name in names]
        except errors.EntryNotFoundError as error:
            reason = error
            if isinstance(error, errors.LocalEntryNotFoundError):
                place["local_files_only"] = True  # that the Hub is out of reach took half a minute
        except UsageError:
            raise
        except Exception as error:  # of the repository, the network, the disk
            reason = error
            break
    raise UsageError(f"{path}: no {wanted} downloaded. huggingface_hub says: {reason}") from reason


def download_file(name, place):
    """A file of the Hub. A new one is compared with its sha256, by which the cache names it."""
    cached = try_to_load_from_cache(
        place["repo_id"], f"{place['subfolder']}/{name}".lstrip("/"), revision=place["revision"])
    file = Path(hf_hub_download(filename=name, **place))
    blob = file.resolve().name
    if not isinstance(cached, str) and re.fullmatch("[0-9a-f]{64}", blob) and sha256(file) != blob:
        file.resolve().unlink()
        raise UsageError(f"{name} of {place['repo_id']}: damaged on its way: run again")
    return file


# --------------------------------------------------------------------------------------------
# The authors' format: metadata.json and a tree of arrays in msgpack, as flax writes it

# What their code fills in where model_config has no such key.
RELEASE_DEFAULTS = {
    "generator": dict(
        input_size=32, in_channels=3, out_channels=3, patch_size=2, hidden_size=1152, depth=28,
        num_heads=16, num_classes=1001, noise_classes=0, noise_coords=1, n_cls_tokens=0,
        attn_fp32=True),
    "mae": dict(in_channels=3, base_channels=64, layers=(2, 2, 2, 2), patch_size=4)}
# Precision and memory are the caller's choice here, dropout acts in training alone, and without
# one of the first three a generator has other tensors, which is seen by itself.
NOT_OURS = ("use_qknorm", "use_swiglu", "use_rmsnorm", "use_rope", "use_bf16", "use_remat",
            "dropout_prob")

# Pattern in a path: our name, in this order; then / becomes a dot.
FLAX_NAMES = {
    "/Dense_0": "", "^Embed_0": "class_embed", r"^noise_embeds_(\d+)/\w+": r"style_embed.\1",
    "^TimestepEmbedder_0/TorchLinear_0": "alpha_embed.0", "^RMSNorm_0": "alpha_norm",
    "^TimestepEmbedder_0/TorchLinear_1": "alpha_embed.2", "^LightningDiT_0/": "",
    "^TorchLinear_0": "patch_embed", "^TorchLinear_1": "cls_proj", "blocks_": "blocks.",
    "Attention_0/TorchLinear_0": "qkv", "Attention_0/TorchLinear_1": "proj", "Attention_0/": "",
    "SwiGLUFFN_0/TorchLinear_0": "mlp_gate", "SwiGLUFFN_0/TorchLinear_1": "mlp_in",
    "SwiGLUFFN_0/TorchLinear_2": "mlp_out", "FinalLayer_0/RMSNorm_0": "final_norm",
    "FinalLayer_0/TorchLinear_0": "final_adaln", "FinalLayer_0/TorchLinear_1": "final_linear",
    "TorchLinear_0": "adaln", "RMSNorm_0": "norm1", "RMSNorm_1": "norm2",
    "(stages|layers)_": r"\1.", "(kernel|scale|embedding)$": "weight"}
FLAX_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
               "bfloat16": torch.bfloat16, "V2": torch.bfloat16}  # V2: its name in older files


def release_config(file, metadata, kind):
    """The constructor's arguments. Of metadata.json only `model_config` has to be there."""
    config = metadata.get("model_config")
    if not isinstance(config, dict):
        raise UsageError(f"{file}: has no model_config")
    if kind == "generator" and not config.get("use_rope"):
        raise UsageError(f"{file}: a generator without use_rope, which is not built here")
    config = {**RELEASE_DEFAULTS[kind], **config}
    return {key: value for key, value in config.items() if key not in NOT_OURS}


def read_flax(file):
    """A flax msgpack file -> the tree, of maps and tensors, and nothing else is built.

    An array is ext type 1 around msgpack of (shape, dtype, bytes), one of over 2^30 bytes a map of
    chunks. A map `params` around the tree is taken off.
    """
    def array(code, data):
        mapped.madvise(mmap.MADV_DONTNEED)  # what has been read need not stay in memory
        shape, dtype, values = msgpack.unpackb(data)
        return torch.frombuffer(bytearray(values), dtype=FLAX_DTYPES[dtype]).reshape(shape)

    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        tree = msgpack.unpackb(mapped, ext_hook=array)
    return tree.get("params", tree)


def from_flax(tree):
    """A tree of arrays -> our state dict. `tree` is emptied on the way, as it may take 10 GB.

    flax kernels are (in, out) and (h, w, in, out), ours (out, in) and (out, in, h, w).
    """
    state = {}
    while tree:
        path, node = tree.popitem()
        if isinstance(node, torch.Tensor):
            if path.endswith("kernel") and node.ndim > 1:
                node = node.movedim((-1, -2), (0, 1))
            state[our_name(path)] = node.clone(memory_format=torch.contiguous_format)
        elif isinstance(node, dict) and "__msgpack_chunked_array__" in node:
            chunks = torch.cat(list(node["chunks"].values()))
            tree[path] = chunks.reshape(list(node["shape"].values()))
        elif isinstance(node, dict):
            tree.update({f"{path}/{key}": child for key, child in node.items()})
        else:
            raise ValueError(f"{path} is a {type(node).__name__}, not an array")
    return stack_styles(state)


def stack_styles(state):
    """A generator's tables style_embed.0, .1, ... become one, as ours."""
    tables = []
    while f"style_embed.{len(tables)}" in state:
        tables.append(state.pop(f"style_embed.{len(tables)}"))
    if tables:
        state["style_embed"] = torch.stack(tables)
    return state


def our_name(path, names=FLAX_NAMES):
    """LightningDiT_0/blocks_0/Attention_0/TorchLinear_0/Dense_0/kernel -> blocks.0.qkv.weight"""
    for pattern, ours in names.items():
        path = re.sub(pattern, ours, path)
    return path.replace("/", ".")


# --------------------------------------------------------------------------------------------
# What all scripts share: messages, processes, and files that are whole or not there

class UsageError(Exception):
    """A mistake of the user's, shown as one line. Every other exception keeps its traceback."""


class HelpFormat(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A script's docstring as it stands, and every option with its default."""


def run_script(main):
    """Run a script's main(), in a process group if torchrun started it."""
    keep_freed_memory()
    if "RANK" in os.environ:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        # If it were imported after the group exists, its default arguments would keep the group's
        # threads alive until the interpreter ends, which then aborts.
        from torch.distributed.nn import functional  # noqa: F401
        # Rank 0 alone computes precision and recall, for many minutes where the CPU is slow.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    try:
        with contextlib.redirect_stderr(LastingStream(sys.stderr)):
            main()
    except UsageError as error:  # where torchrun started us, it ends the other processes too
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class LastingStream:
    """A stream that drops what a closed terminal no longer takes: the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def keep_freed_memory():
    """Tell glibc not to give freed memory back to the system, which it would soon ask for again.

    On a CPU the pages of a step's tensors then appear once, and not in each step: the drift loss
    takes 0.6 to 0.85 of the time, a step of `fashion` 0.8 to 0.9.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
            libc.mallopt(-3, 32 << 20)   # M_MMAP_THRESHOLD, at most this


def note(text):
    """A line on stderr, of rank 0 alone, above a progress bar."""
    if get_rank() == 0:
        tqdm.write(text, file=sys.stderr)


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(x):
    """The sum over all processes, in place: every one of them must come here, in this order."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(value):
    """The values of all processes, as a list (pickled: only what this run's processes made)."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_shared(folder):
    """Make a folder, and see that all processes find it: several machines need a common disk."""
    folder = Path(folder)
    if get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".token_{gather(os.getpid())[0]}"
    if get_rank() == 0:
        token.touch()
    barrier()
    deadline = time.time() + 60  # NFS shows new files late
    while not token.exists() and time.time() < deadline:
        time.sleep(1)
    found = gather(token.exists())
    if get_rank() == 0:
        token.unlink()
    if not all(found):
        raise UsageError(f"{folder} is not the same folder on every machine: they need a common "
                         "disk")


@contextlib.contextmanager
def claim(folder):
    """Hold a folder for this run alone, as two writers would mix. A run's death frees it too."""
    check_shared(folder)
    if get_rank() == 0:
        lock = open(Path(folder) / ".lock", "w")
        try:
            import fcntl  # not on Windows
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run writes to {folder}: wait for it, or end it") from None
        except (ImportError, OSError) as error:  # Lustre and EFS may have no locks
            note(f"{folder} cannot be locked ({error}): do not start a second run there")
    yield


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as partial`: write a file or a folder at `partial`, beside `path`.

    It is synced and takes its name when it is whole: no reader ever finds half of it.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    remove(partial)  # of a run that was killed
    yield partial
    for file in (*partial.rglob("*"), partial):
        sync(file)
    if path.is_dir():
        remove(path)
    partial.replace(path)
    sync(path.parent)


def remove(path):
    """Delete a file or a folder if it is there and can be deleted: on NFS it may be in use."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """Wait until it is on the disk: else a power cut could leave a renamed file without content."""
    with contextlib.suppress(OSError):  # CIFS, FUSE and Windows cannot sync folders
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
