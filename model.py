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
import os
import re
import shutil
import sys
import time
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import msgpack
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin, errors, hf_hub_download
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from drift import float32_at_least, multi_scale_features

CHECKPOINT = dict(use_reentrant=False, preserve_rng_state=False)  # options of `checkpoint`
SHARED_SECONDS = 60  # NFS shows new files late


class Pretrained(PyTorchModelHubMixin, library_name="drifting", license="mit"):
    """save_pretrained, from_pretrained, push_to_hub of huggingface_hub, strict about weights.

    config.json holds the constructor's arguments; `model_type`: "generator" or the class's name in
    ENCODERS; and `origin`: the names of a trained network's classes, and its VAE's sha256.
    """

    origin = {}

    def save_pretrained(self, save_directory, **options):
        names = {cls: name for name, cls in [("generator", Generator), *ENCODERS.items()]}
        config = {**(self._hub_mixin_config or {}), "model_type": names[type(self)]}
        if self.origin:
            config["origin"] = self.origin
        super().save_pretrained(save_directory, **{**options, "config": config})
        # safetensors writes files that only their owner can read: give them config.json's mode.
        folder = Path(save_directory)
        shutil.copymode(folder / "config.json", folder / "model.safetensors")

    @classmethod
    def _from_pretrained(cls, **options):
        return super()._from_pretrained(**{**options, "strict": True})


# Table 8. XXS to S are ours, for small images on small machines.
GENERATOR_SIZES = {
    "XXS": dict(hidden_size=128, depth=3, num_heads=1, n_cls_tokens=0),
    "XS": dict(hidden_size=128, depth=3, num_heads=4, n_cls_tokens=1),
    "S": dict(hidden_size=384, depth=10, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),  # W-Flow's
}


# ---- Generator -----------------------------------------------------------------------------------

class Generator(nn.Module, Pretrained):
    """DiT from noise to sample in one forward pass (A.2, Table 8), given class, alpha and styles.

    Sizes: `Generator(**GENERATOR_SIZES["B"], ...)`. The defaults are those of latents 32x32x4.
    Styles are extra, discrete noise: `noise_coords` times one of `noise_classes` embeddings.
    forward() must not draw random numbers, as dropout does: micro-batches compute samples twice.
    head_channels: width of a convolutional head behind the last layer, which paints each patch
    alone and can leave their borders visible in small images; 0: none, as in the paper.
    """

    def __init__(self, input_size=32, in_channels=4, out_channels=None, patch_size=2,
                 hidden_size=768, depth=12, num_heads=12, mlp_ratio=4.0, cond_dim=None,
                 num_classes=1000, noise_classes=64, noise_coords=32, n_cls_tokens=16,
                 attn_fp32=False, head_channels=0):
        super().__init__()
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.num_classes = num_classes
        self.noise_classes, self.noise_coords = noise_classes, noise_coords
        self.checkpoint_blocks = False  # True: a third more work, activations 1/20 of the memory
        cond_dim = cond_dim or hidden_size
        grid = input_size // patch_size

        self.class_embed = nn.Embedding(num_classes, cond_dim)
        self.style_embed = nn.Parameter(torch.empty(noise_coords, noise_classes, cond_dim))
        self.alpha_embed = nn.Sequential(
            nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.alpha_norm = RMSNorm(cond_dim)

        self.patch_embed = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.pos_embed = nn.Parameter(sincos_2d(grid, hidden_size)[None])
        self.cls_proj = nn.Linear(cond_dim, hidden_size)
        self.cls_embed = nn.Parameter(torch.empty(1, n_cls_tokens, hidden_size))
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, cond_dim, attn_fp32) for _ in range(depth))
        self.final_norm = RMSNorm(hidden_size)
        self.final_adaln = nn.Linear(cond_dim, 2 * hidden_size)
        self.final_linear = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self.head = None
        if head_channels:  # three 3x3 convolutions, which see across the borders of patches
            self.head = nn.Sequential(
                nn.Conv2d(self.out_channels, head_channels, 3, padding=1), nn.SiLU(),
                nn.Conv2d(head_channels, head_channels, 3, padding=1), nn.SiLU(),
                nn.Conv2d(head_channels, self.out_channels, 3, padding=1))
        rope = rotary_table(n_cls_tokens + grid**2, hidden_size // num_heads)
        self.register_buffer("rope", rope, persistent=False)
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
        if self.head is not None:
            nn.init.zeros_(self.head[-1].weight)
            nn.init.zeros_(self.head[-1].bias)

    def embed_label(self, class_labels):
        """Labels [n] -> [n, cond_dim]. Nothing else in the network knows that they are classes."""
        return self.class_embed(class_labels)

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
            return self.embed_label(class_labels) + styles + 0.02 * alpha

    def forward(self, noise, class_labels, cfg_scale, style_indices):
        """noise [n, c, h, w], class_labels [n], cfg_scale [n] (alpha), style_indices
        [n, noise_coords] -> samples [n, c, h, w]."""
        # Without these, one row or one style would be broadcast to all in silence.
        size = (self.in_channels, self.input_size, self.input_size)
        assert noise.shape[1:] == size, f"noise of {list(noise.shape)}"
        assert len(class_labels) == len(cfg_scale) == len(noise), "a label and an alpha a sample"
        assert style_indices.shape == (len(noise), self.noise_coords), "noise_coords styles each"
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
        x = rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", p=p, q=p, h=h)
        if self.head is not None:
            x = x + self.head(x)
        return x


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
        q, k, v = rearrange(self.qkv(x), "n t (qkv h d) -> qkv n h t d", qkv=3, h=self.num_heads)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        if self.attn_fp32:
            q, k, v = float32_at_least(q), float32_at_least(k), float32_at_least(v)
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q, k, v)                             # n heads t d
        return self.proj(rearrange(x, "n heads t d -> n t (heads d)"))


class RMSNorm(nn.RMSNorm):
    """Keeps the input dtype: autocast on CUDA would return float32, twice the memory."""

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


# ---- The encoder of the paper --------------------------------------------------------------------

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

        With bfloat16 weights maps are bfloat16, the statistics of them float32.
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


# ---- Networks of others: ConvNeXt-V2 and DINOv2, whose features are of pixels, and the SD-VAE ----

def imagenet_input(x, size, mode):
    """Images [n, 3, h, w] in [-1, 1] -> [n, 3, size, size], standardised by ImageNet's mean and
    std and resized with antialias; mode: "bilinear" or "bicubic"."""
    # Plain numbers, since a tensor of them would be copied to the GPU in every call.
    channels = zip(float32_at_least(x).unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.stack([((channel + 1) / 2 - mean) / std for channel, mean, std in channels], 1)
    return F.interpolate(x, (size, size), mode=mode, antialias=True)


class ConvNeXtV2(nn.Module, Pretrained):
    """ConvNeXt-V2, an encoder of pixels (A.5; P: FID 9.35 -> 3.70), with transformers' config."""

    def __init__(self, depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024), num_channels=3,
                 patch_size=4, image_size=224, layer_norm_eps=1e-12):
        super().__init__()
        self.in_channels, self.image_size = num_channels, image_size
        width = hidden_sizes[0]
        # Before the first stage: patchify, norm; before the others: norm, halve the size.
        self.downsampling = nn.ModuleList([nn.Sequential(
            nn.Conv2d(num_channels, width, patch_size, patch_size), ChannelNorm(width))])
        for before, width in pairwise(hidden_sizes):
            self.downsampling.append(nn.Sequential(
                ChannelNorm(before), nn.Conv2d(before, width, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvNeXtBlock(width) for _ in range(depth)])
            for depth, width in zip(depths, hidden_sizes))
        self.layernorm = nn.LayerNorm(hidden_sizes[-1], eps=layer_norm_eps)

    def features(self, x):
        """x [n, 3, h, w] in [-1, 1], of any size -> {name: [n, T, C]}; `convenxt` as the release.

        Maps of the second stage on, each position normalised over its channels; means and stds of
        these maps for all stages, the last std again as `global_std`; and `global_mean`, the final
        norm of the mean of the last, unnormalised map.
        """
        x = imagenet_input(x, self.image_size, "bilinear").to(self.layernorm.weight.dtype)
        features = {}
        for i, stage in enumerate(self.stages):
            x = stage(self.downsampling[i](x))                                      # n c h w
            y = rearrange(float32_at_least(x), "n c h w -> n (h w) c")
            mean, std = mean_and_std(y, 2)
            y = (y - mean) / (std + 1e-3)                                           # n T c
            if i > 0:
                features[f"convenxt_stage_{i}"] = y
            mean, std = mean_and_std(y, 1)                                          # n 1 c
            features[f"convenxt_stage_{i}_mean"] = mean
            features[f"convenxt_stage_{i}_std"] = std
        norm = self.layernorm
        last = float32_at_least(x).mean((2, 3))[:, None]                            # n 1 c
        last = F.layer_norm(last, norm.normalized_shape, eps=norm.eps)
        features["global_mean"] = last * norm.weight + norm.bias  # float32 whatever the weights
        features["global_std"] = std
        return features


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, and an MLP whose channels are weighted by their norms over space."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn_weight = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        self.grn_bias = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))                      # n h w c
        y = F.gelu(self.pwconv1(y))                                                 # n h w 4c
        precise = torch.promote_types(y.dtype, torch.float32)
        norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=precise)
        response = (norm / (norm.mean(3, keepdim=True) + 1e-6)).to(y.dtype)         # n 1 1 4c
        y = self.pwconv2(self.grn_weight * (y * response) + self.grn_bias + y)
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mean_and_std(x, dim):
    """Mean and biased standard deviation along one axis, which is kept."""
    variance, mean = torch.var_mean(x, dim, correction=0, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


class DINOv2(nn.Module, Pretrained):
    """DINOv2 (Oquab et al. 2023), a ViT without registers, as an encoder of pixels.

    table_side: patches along a side of the position table; image_size: side to which images are
    resized, a multiple of patch_size.
    """

    def __init__(self, width=768, depth=12, patch_size=14, table_side=37, image_size=224):
        super().__init__()
        self.in_channels = 3
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used in its own training alone
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + table_side**2, width))
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.blocks = nn.ModuleList(DINOv2Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def features(self, x):
        """x [n, 3, h, w] in [-1, 1], of any size -> {name: [n, T, C]}.

        `dinov2`, the map of patches, and `dinov2_blkN`, those after a quarter, half and three
        quarters of the blocks, each after the final norm and with the statistics of
        `multi_scale_features`; and `dinov2_cls`, the class token.
        """
        x = imagenet_input(x, self.image_size, "bicubic")
        x = self.patch_embed(x.to(self.cls_token.dtype))                            # n d 16 16
        side = x.shape[2]
        x = rearrange(x, "n d h w -> n (h w) d")
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)                # n (1 + T) d
        x = x + self.positions(side)
        depth = len(self.blocks)
        quarters = [math.ceil(k * depth / 4) for k in (1, 2, 3, 4)]
        maps = {}
        for i, block in enumerate(self.blocks, 1):
            x = block(x)
            if i in quarters:
                y = self.norm(x)
                name = "dinov2" if i == depth else f"dinov2_blk{i}"
                maps[name] = rearrange(y[:, 1:], "n (h w) d -> n d h w", h=side)
        return {"dinov2_cls": y[:, :1], **multi_scale_features(maps)}

    def positions(self, side):
        """The position table for side x side patches [1, 1 + side^2, d]."""
        table_side = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == table_side:
            return self.pos_embed
        table = rearrange(self.pos_embed[:, 1:], "n (h w) d -> n d h w", h=table_side)
        # By this factor, as the authors do: by the size itself outputs differ by 1% of their std.
        factor = (side + 0.1) / table_side
        table = F.interpolate(float32_at_least(table), scale_factor=factor, mode="bicubic")
        table = rearrange(table, "n d h w -> n (h w) d").to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], table], 1)


class DINOv2Block(nn.Module):
    """Transformer block: norm, attention, scale of each channel; norm, MLP, scale."""

    def __init__(self, width):
        super().__init__()
        # The files do not say it: 64 channels a head in all published sizes, 16 in tiny ones.
        self.num_heads = width // 64 if width % 64 == 0 else width // 16
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x):
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "n t (qkv h d) -> qkv n h t d", qkv=3, h=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v)                                 # n heads t d
        x = x + self.scale1 * self.proj(rearrange(y, "n heads t d -> n t (heads d)"))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


LATENT_SCALE = 0.18215  # latents are this times the VAE's, so that their variance is about 1
SD_VAE = "hf://stabilityai/sd-vae-ft-mse"  # the default of all --vae options
VAE_FILES = (("config.json", "diffusion_pytorch_model.safetensors"),
             ("config.json", "diffusion_pytorch_model.bin"))


def load_vae(path=SD_VAE, device="cpu", sha256=None):
    """The SD-VAE (diffusers' AutoencoderKL) of a folder or the Hub, frozen; bfloat16 on a GPU.

    sha256: of the weights that made the latents at hand, which another VAE would decode wrongly.
    """
    weights = find_files(path, VAE_FILES)[1]
    with open(weights, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, found):
        raise UsageError(f"--vae {path} is not the VAE that made the latents, of sha256 {sha256}")
    from diffusers import AutoencoderKL  # takes three seconds, which other commands need not wait
    net, misfits = AutoencoderKL.from_pretrained(
        weights.parent, use_safetensors=weights.suffix == ".safetensors", low_cpu_mem_usage=False,
        output_loading_info=True)
    assert not any(misfits.values()), misfits  # diffusers would fill them with random numbers
    assert net.config.scaling_factor == LATENT_SCALE
    vae = VAE(net)
    vae.sha256 = found
    on_gpu = torch.device(device).type == "cuda"
    return vae.to(device, torch.bfloat16 if on_gpu else torch.float32)


class VAE(nn.Module):
    """Images [n, 3, 8h, 8w] in [-1, 1] <-> latents [n, 4, h, w], `chunk` of them at a time.

    That bounds the memory whatever n: 2 GB an image where gradients are kept, else 0.2 GB.
    """

    chunk = 16
    sha256 = None

    def __init__(self, net):
        super().__init__()
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def decode(self, latents):
        """Latents -> images in float32, about in [-1, 1]. Gradients pass through."""
        # Where gradients are wanted, a chunk's activations are computed a second time, not kept.
        return torch.cat([checkpoint(self._decode, z, **CHECKPOINT)
                          for z in self._chunks(latents / LATENT_SCALE)])

    @torch.no_grad()
    def encode(self, images):
        """Images -> mean and standard deviation [n, 4, h, w] of their latents, float32."""
        posteriors = [self.net.encode(x).latent_dist for x in self._chunks(images)]
        mean = torch.cat([posterior.mean for posterior in posteriors]).float()
        std = torch.cat([posterior.std for posterior in posteriors]).float()
        return mean * LATENT_SCALE, std * LATENT_SCALE

    def _decode(self, z):
        return self.net.decode(z).sample.float()

    def _chunks(self, x):
        # On a CPU one at a time: that is faster, and an image's bits do not depend on the others.
        size = 1 if x.device.type == "cpu" else self.chunk
        return x.to(self.net.dtype, memory_format=torch.channels_last).split(size)


# ---- Loading: checkpoints of ours, of the authors, of others; from folders and the Hub -----------

# A new encoder is a class derived from nn.Module and Pretrained, with `in_channels` and `features`
# as MAE has them, and an entry here. YOURS(...).save_pretrained(FOLDER) then writes weights and
# the constructor's arguments (numbers, lists) for --encoder FOLDER and load_encoder to read.
# Images come in float32, weights are bfloat16 under --bf16: cast the images to their type.
# Names of features must differ between encoders; `global` is that of the samples themselves.
ENCODERS = {"mae": MAE, "convnextv2": ConvNeXtV2, "dinov2": DINOv2}

# hf://NAME: the authors' weights on the Hub, and W-Flow's, which are single files.
PUBLISHED = {place.split("/")[-1]: f"Goodeat/drifting/models/{place}" for place in (
    "gen/jax/latent_L_sota", "gen/jax/latent_B_sota", "gen/jax/pixel_L_sota",
    "gen/jax/pixel_B_sota", "gen/jax/ablation",
    "mae/jax/mae_latent_640", "mae/jax/mae_pixel_640", "mae/jax/mae_latent_256")}
PUBLISHED |= {f"wflow_{name}": f"jiaqihan99/W-Flow/checkpoints/latent_{file}.pt"
              for name, file in {
    "ablation": "ablation_ot/state_00030000", "B": "sota_B_ot/state_00200000",
    "L": "sota_L_ot/state_00200000", "XL": "sota_XL_ot/state_00180000"}.items()}

# The files of a model, its description and its weights, in the order in which they are looked for:
# the authors' artifact; ours and transformers'; transformers' before safetensors.
MODEL_FILES = (("metadata.json", "ema_params.msgpack"), ("config.json", "model.safetensors"),
               ("config.json", "pytorch_model.bin"))

# The kind of files without `model_type`, such as the authors', by a tensor unique to that kind.
KINDS = {"class_embed.weight": "generator", "encoder.conv1.weight": "mae", "cls_token": "dinov2"}


def load_generator(path):
    """Generator in eval mode and float32.

    path: a run or checkpoint folder, a folder of the authors' artifact, W-Flow's state_*.pt, or
    on the Hub hf://NAME (one of PUBLISHED) or hf://USER/REPO[/SUBFOLDER][@REVISION].
    """
    return load_model(path, {"generator": Generator})


def load_encoder(path):
    """One of ENCODERS; paths as in `load_generator`, transformers' folders, DINOv2's .pth."""
    return load_model(path, ENCODERS)


def load_model(path, classes):
    """The network of a path in eval mode and float32; its class is one of {kind: class}."""
    description, weights = find_files(path, MODEL_FILES)
    state = read_weights(weights)
    config = {}
    if description != weights:
        config = json.loads(description.read_text())
    origin = config.pop("origin", {})
    kind = config.pop("model_type", None)
    if kind is None:
        kind = next(kind for tensor, kind in KINDS.items() if tensor in state)
    if kind not in classes:
        raise UsageError(f"{path} holds a network of kind {kind}, not {' or '.join(classes)}")
    if weights.suffix == ".msgpack":
        config = release_config(config, classes[kind])
    elif weights.name.startswith("state_"):
        config = wflow_config(state)
    elif kind == "convnextv2":
        config, state = from_convnext(config, state)
    elif kind == "dinov2" and "width" not in config:  # then it is not one of ours
        config, state = from_dinov2(state)
    with Unfilled():
        net = classes[kind](**config)
    net.load_state_dict(state, assign=True)
    net.origin = origin
    return net.float().eval()  # in float32 whatever the type in the file


class Unfilled(TorchFunctionMode):
    """Networks built inside do not fill their parameters, which a file's tensors will replace.

    This saves time and memory: pages to which nobody has written take none. Buffers are filled,
    since those which a constructor computes may be in no file. One computed from a parameter's
    initial values would be wrong.
    """

    FILLS = ("uniform_", "normal_", "kaiming_uniform_", "constant_", "zero_", "fill_")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init gives it by its name
        if isinstance(tensor, nn.Parameter) and function.__name__ in self.FILLS:
            return tensor
        return function(*args, **kwargs)


def digest(state):
    """sha256 of a network's tensors, which is the same wherever its files are."""
    result = hashlib.sha256()
    for tensor in state.values():
        result.update(tensor.cpu().contiguous().numpy())
    return result.hexdigest()


def latest_checkpoint(run):
    """The newest step_* folder of a run, or None. One that is being written has another name."""
    return max(Path(run).glob("step_" + "[0-9]" * 8), default=None)


def find_files(path, forms):
    """[description, weights]: the first of the pairs of names `forms` that `path` holds.

    A single file is both. From the Hub only these files are downloaded.
    """
    if str(path).startswith("hf://"):
        return download(str(path), forms)
    folder = latest_checkpoint(path) or Path(path)
    if folder.is_file():
        return [folder, folder]
    if (folder / "params_ema").is_dir():  # a run of the authors' code
        folder = folder / "params_ema"
    for names in forms:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    raise UsageError(f"{path}: no weights there, tried {forms}; for the Hub give hf://...")


def download(path, forms):
    name, _, revision = path.removeprefix("hf://").partition("@")
    parts = PUBLISHED.get(name, name).strip("/").split("/")
    if len(parts) < 2:
        raise UsageError(f"{path}: neither hf://USER/REPO[/SUBFOLDER][@REVISION] nor one of "
                         f"{', '.join(PUBLISHED)}")
    if parts[-1].endswith((".pt", ".pth")):
        file = parts.pop()
        forms = [(file, file)]
    place = dict(repo_id="/".join(parts[:2]), subfolder="/".join(parts[2:]),
                 revision=revision or None)
    for names in forms:
        try:
            return [Path(hf_hub_download(filename=name, **place)) for name in names]
        except errors.EntryNotFoundError as error:
            reason = error
    raise UsageError(f"{path}: no weights downloaded. huggingface_hub says: {reason}") from reason


def read_weights(file):
    """{our name: tensor}, of flax, of safetensors, or of PyTorch's format without running code."""
    if file.suffix == ".msgpack":
        return from_flax(read_flax(file))
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.name.startswith("state_"):  # W-Flow's. Mapped: its optimizer never comes into memory
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["ema_model"]
        return stack_styles({our_name(name, WFLOW_NAMES): x.detach() for name, x in saved.items()})
    return torch.load(file, map_location="cpu", weights_only=True)


# ---- The formats of others; in the tables of names, each pattern is replaced in turn -------------

def our_name(name, table):
    """LightningDiT_0/blocks_0/Attention_0/TorchLinear_0/Dense_0/kernel -> blocks.0.qkv.weight"""
    for pattern, ours in table.items():
        name = re.sub(pattern, ours, name)
    return name.replace("/", ".")


def arguments(cls, config):
    """The entries of `config` that the constructor takes."""
    return {key: config[key] for key in inspect.signature(cls).parameters if key in config}


# transformers' ConvNeXt-V2. Files from before May 2023 have gamma and beta.
CONVNEXT_NAMES = {
    r"^convnextv2\.": "", r"^encoder\.": "", r"grn\.(gamma|weight)": "grn_weight",
    r"grn\.(beta|bias)": "grn_bias", r"^embeddings\.patch_embeddings": "downsampling.0.0",
    r"^embeddings\.layernorm": "downsampling.0.1", r"^stages\.(\d)\.layers": r"stages.\1",
    r"^stages\.(\d)\.downsampling_layer": r"downsampling.\1"}


def from_convnext(config, state):
    """config.json and weights of transformers' ConvNeXt-V2, with or without classifier, as ours."""
    state = {our_name(name, CONVNEXT_NAMES): tensor for name, tensor in state.items()
             if not name.startswith("classifier.")}
    return arguments(ConvNeXtV2, config), state


# DINOv2's, of the authors' files and of transformers.
DINOV2_NAMES = {
    r"\.attn\.": ".", r"\.mlp\.": ".", r"ls(\d)\.gamma": r"scale\1",
    r"^patch_embed\.proj": "patch_embed",
    r"^embeddings\.": "", "^position_embeddings": "pos_embed", r"^encoder\.layer\.": "blocks.",
    r"^patch_embeddings\.projection": "patch_embed", "^layernorm": "norm",
    r"attention\.attention\.": "", r"attention\.output\.dense": "proj",
    r"layer_scale(\d)\.lambda1": r"scale\1"}


def from_dinov2(state):
    """Our arguments and weights of a DINOv2, by its tensors alone."""
    state = {our_name(name, DINOV2_NAMES): tensor for name, tensor in state.items()}
    for name in [name for name in state if ".query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("query", "qkv")] = torch.cat(parts)
    width, _, _, patch_size = state["patch_embed.weight"].shape
    depth = sum(name.endswith(".qkv.weight") for name in state)
    table_side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return dict(width=width, depth=depth, patch_size=patch_size, table_side=table_side), state


# W-Flow's generators.
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


# The authors' release: metadata.json and a tree of arrays in msgpack, as flax writes it.
# These are what their code fills in where model_config has no such key.
RELEASE_DEFAULTS = {
    Generator: dict(
        in_channels=3, out_channels=3, hidden_size=1152, depth=28, num_heads=16, num_classes=1001,
        noise_classes=0, noise_coords=1, n_cls_tokens=0, attn_fp32=True),
    MAE: dict(in_channels=3, base_channels=64, layers=(2, 2, 2, 2), patch_size=4)}

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


def release_config(metadata, cls):
    """The constructor's arguments. Of metadata.json only `model_config` has to be there.

    Precision and memory are the caller's choice here, dropout acts in training alone, and a
    generator without use_qknorm, use_swiglu or use_rmsnorm has other tensors, which strict loading
    finds. Rotary positions have none: without use_rope a generator would load and be wrong.
    """
    config = metadata["model_config"]
    assert cls is MAE or config.get("use_rope"), "a generator without use_rope"
    return arguments(cls, {**RELEASE_DEFAULTS[cls], **config})


def read_flax(file):
    """A flax msgpack file -> the tree of maps and tensors.

    An array is ext type 1 around msgpack of (shape, dtype, bytes); above 2^30 bytes it is a map of
    chunks. An outer map `params` is stripped.
    """
    def array(code, data):
        shape, name, values = msgpack.unpackb(data)
        dtype = torch.bfloat16 if name == "V2" else getattr(torch, name)  # V2: in older files
        return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape)

    with open(file, "rb") as f:  # read an array at a time, as the whole may be 10 GB
        tree = msgpack.Unpacker(f, ext_hook=array, max_buffer_size=0).unpack()
    return tree.get("params", tree)


def from_flax(tree):
    """A tree of arrays -> our state dict. `tree` is emptied on the way, to halve the memory.

    flax kernels are (in, out) and (h, w, in, out), ours (out, in) and (out, in, h, w).
    """
    state = {}
    while tree:
        path, node = tree.popitem()
        if isinstance(node, torch.Tensor):
            if path.endswith("kernel") and node.ndim > 1:
                node = node.movedim((-1, -2), (0, 1))
            state[our_name(path, FLAX_NAMES)] = node.clone(memory_format=torch.contiguous_format)
        elif isinstance(node, dict) and "__msgpack_chunked_array__" in node:
            chunks = torch.cat(list(node["chunks"].values()))
            tree[path] = chunks.reshape(list(node["shape"].values()))
        else:
            tree.update({f"{path}/{key}": child for key, child in node.items()})
    return stack_styles(state)


def stack_styles(state):
    """A generator's tables style_embed.0, .1, ... become one, as ours."""
    count = sum(name.startswith("style_embed.") for name in state)
    if count:
        state["style_embed"] = torch.stack([state.pop(f"style_embed.{i}") for i in range(count)])
    return state


# ---- Shared by all scripts: messages, processes, and atomic writing of files ---------------------

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
        # Other ranks wait while rank 0 works alone, e.g. on previews: minutes on a slow CPU.
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
    """A stream that ignores the errors of a closed terminal, so that the run goes on."""

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
    token = Path(folder, f".token_{gather(os.getpid())[0]}")
    if get_rank() == 0:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier()
    deadline = time.time() + SHARED_SECONDS
    while not token.exists() and time.time() < deadline:
        time.sleep(1)
    found = gather(token.exists())
    if get_rank() == 0:
        token.unlink()
    if not all(found):
        raise UsageError(f"{folder} is not on a disk that all machines share")


@contextlib.contextmanager
def lock_folder(folder):
    """Lock a folder for the `with` block, since two runs would mix up their files."""
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
def atomic_write(path):
    """`with atomic_write(path) as partial`: write a file or a folder at `partial`, beside `path`.

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
    """Delete a file or folder if it exists, ignoring folder errors: on NFS it may be busy."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """Wait until it is on the disk: else a power cut could leave a renamed file without content."""
    try:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    except OSError:  # CIFS, FUSE and Windows cannot sync folders; a file's error is a full disk
        if not Path(path).is_dir():
            raise
