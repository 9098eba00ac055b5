"""The networks: the one-step DiT generator (A.2), the encoders (A.3, A.5), the VAE, and how their weights are read.

Module and config names follow the authors' release, so that a published `metadata.json` builds the model as it stands.
Axes in shape comments: n samples, c channels, h w pixels, t tokens (in-context ones first), d width.
"""
import argparse
import contextlib
import datetime
import errno
import inspect
import json
import math
import mmap
import os
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from drift import float32_at_least, multi_scale_features

# What the Hub's page of a saved model says (save_pretrained, push_to_hub).
HUB_CARD = dict(library_name="drifting", license="mit", tags=["drifting", "one-step-generation"],
                paper_url="https://arxiv.org/abs/2602.04770", model_card_template="""---
{{ card_data }}
---
# A model of "Generative Modeling via Drifting"

One-step image generation ([paper]({{ paper_url }})). `config.json` holds the constructor's arguments, `model.safetensors` the
weights, averaged over training. With the project's scripts beside you:

```bash
python sample.py --ckpt hf://USER/REPO                # if it is a generator: a grid of samples
python train.py --encoder hf://USER/REPO ...          # if it is an encoder: train a generator in its features
```

```python
from model import Generator, MAE
generator = Generator.from_pretrained("USER/REPO")    # noise [n,c,h,w], class [n], alpha [n], style indices [n,32] -> [n,c,h,w]
encoder = MAE.from_pretrained("USER/REPO")            # encoder.features(x [n,c,h,w]) -> {name: [n,T,C]}
```
""")


class Pretrained(PyTorchModelHubMixin, **HUB_CARD):
    """save_pretrained, from_pretrained, push_to_hub as the Hub's users know them, but weights that do not fit are an error."""

    @classmethod
    def _from_pretrained(cls, **options):
        return super()._from_pretrained(**{**options, "strict": True})


# Table 8. XS and S are ours, for small images on small machines.
GENERATOR_SIZES = {
    "XS": dict(hidden_size=128, depth=3, num_heads=4, n_cls_tokens=1),
    "S": dict(hidden_size=384, depth=10, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
}


# ------------------------------------------------------------------------------------------------------------------
# Generator

class Generator(nn.Module, Pretrained):
    """DiT from noise to sample in one forward pass (A.2, Table 8): noise, class, alpha and styles in, image out.

    Sizes: `Generator(**GENERATOR_SIZES["B"], ...)`. The defaults are those of latents 32x32x4 with patch 2.
    style: `noise_coords` extra discrete noises, each one of `noise_classes` embeddings.
    """

    def __init__(self, input_size=32, in_channels=4, out_channels=None, patch_size=2, hidden_size=768, depth=12,
                 num_heads=12, mlp_ratio=4.0, cond_dim=None, num_classes=1000, noise_classes=64, noise_coords=32,
                 n_cls_tokens=16, attn_fp32=False):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4 or hidden_size // num_heads % 2:
            raise ValueError(f"generator: patch_size {patch_size} must divide input_size {input_size}, 4 and num_heads "
                             f"{num_heads} hidden_size {hidden_size}, and a head's width must be even")
        self.input_size, self.in_channels, self.patch_size = input_size, in_channels, patch_size
        self.out_channels = out_channels or in_channels
        self.num_classes, self.noise_classes, self.noise_coords = num_classes, noise_classes, noise_coords
        cond_dim, grid = cond_dim or hidden_size, input_size // patch_size

        self.class_embed = nn.Embedding(num_classes, cond_dim)
        self.style_embed = nn.Parameter(torch.empty(noise_coords, noise_classes, cond_dim))  # a table of its own each
        self.alpha_embed = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.alpha_norm = RMSNorm(cond_dim)

        self.patch_embed = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.pos_embed = nn.Parameter(sincos_2d(grid, hidden_size)[None])
        self.cls_proj = nn.Linear(cond_dim, hidden_size)
        self.cls_embed = nn.Parameter(torch.empty(1, n_cls_tokens, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, cond_dim, attn_fp32) for _ in range(depth))
        self.final_norm = RMSNorm(hidden_size)
        self.final_adaln = nn.Linear(cond_dim, 2 * hidden_size)
        self.final_linear = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        with torch.device("cpu"):  # real, even where `_load` builds parameters on the meta device
            self.register_buffer("rope", rotary_table(n_cls_tokens + grid**2, hidden_size // num_heads), persistent=False)
        self.checkpoint_blocks = False  # True: recompute each block in the backward pass, a third more work, 1/20 memory
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_embed.weight, self.style_embed, self.cls_embed,
                      self.alpha_embed[0].weight, self.alpha_embed[2].weight):
            nn.init.normal_(table, std=0.02)
        for zero in (self.final_linear, self.final_adaln, *(block.adaln for block in self.blocks)):  # adaLN-zero
            nn.init.zeros_(zero.weight)

    def condition(self, class_labels, cfg_scale, style_indices):
        """Condition vector [n, cond_dim], float32: class + sum of styles + 0.02 * norm(MLP(alpha))."""
        with torch.autocast(class_labels.device.type, enabled=False):
            frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=cfg_scale.device))
            angles = cfg_scale.to(self.pos_embed.dtype)[:, None] * frequencies                   # n 128
            alpha = self.alpha_norm(self.alpha_embed(torch.cat([angles.cos(), angles.sin()], 1)))
            # One lookup in all tables: unlike that of indexing, its backward adds up in a fixed order on a CPU.
            rows = style_indices + self.noise_classes * torch.arange(self.noise_coords, device=style_indices.device)
            styles = F.embedding(rows, self.style_embed.flatten(0, 1)).sum(1)                    # n d
            return self.class_embed(class_labels) + styles + 0.02 * alpha

    def forward(self, noise, class_labels, cfg_scale, style_indices):
        """noise [n, c, h, w], class_labels [n], cfg_scale [n] (alpha), style_indices [n, noise_coords] -> [n, c, h, w]."""
        p = self.patch_size
        cond = self.condition(class_labels, cfg_scale, style_indices)                            # n d
        x = rearrange(noise, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)                     # n t (p q c)
        x = self.patch_embed(x)
        x = x + self.pos_embed.to(x.dtype)                                                       # n t d
        in_context = self.cls_proj(cond)[:, None] + self.cls_embed                               # n 16 d
        x = torch.cat([in_context.to(x.dtype), x], 1)                                            # n (16 + t) d
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, cond, self.rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cond, self.rope)
        shift, scale = modulation(self.final_adaln, cond, 2)
        x = modulate(self.final_norm(x[:, self.cls_embed.shape[1]:]), shift, scale)              # n t d
        x = self.final_linear(x)                                                                 # n t (p q c)
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", p=p, q=p, h=self.input_size // p)


class Block(nn.Module):
    """Transformer block: adaLN-zero, RMSNorm, attention with RMS-normalised q and k and rotary positions, SwiGLU."""

    def __init__(self, width, num_heads, mlp_ratio, cond_dim, attn_fp32):
        super().__init__()
        hidden = math.ceil(int(mlp_ratio * width * 2 / 3) / 32) * 32  # two matrices gate: 2/3 keeps the parameter count
        self.num_heads, self.attn_fp32 = num_heads, attn_fp32
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
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.adaln, cond, 6)           # n 1 d each
        x = x + gate1.to(x.dtype) * self.attention(modulate(self.norm1(x), shift1, scale1), rope)
        h = modulate(self.norm2(x), shift2, scale2)                                              # n t d
        return x + gate2.to(x.dtype) * self.mlp_out(F.silu(self.mlp_gate(h)) * self.mlp_in(h))

    def attention(self, x, rope):
        q, k, v = rearrange(self.qkv(x), "n t (three heads d) -> three n heads t d", three=3, heads=self.num_heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if self.attn_fp32:
            q, k, v = float32_at_least(q), float32_at_least(k), float32_at_least(v)
        with torch.autocast(x.device.type, enabled=False):
            x = F.scaled_dot_product_attention(q, k, v)                                          # n heads t d
        return self.proj(rearrange(x, "n heads t d -> n t (heads d)"))


class RMSNorm(nn.RMSNorm):
    """Affine RMSNorm in the input's type: the kernel computes in float32 itself. Under autocast CUDA would return float32."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def modulation(linear, cond, chunks):
    """adaLN: SiLU, then linear, in float32 even under autocast. Returns `chunks` tensors [n, 1, d]."""
    with torch.autocast(cond.device.type, enabled=False):
        return linear(F.silu(cond))[:, None].chunk(chunks, -1)


def modulate(x, shift, scale):
    return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)


def rotary_table(length, head_dim):
    """Rotary angles of a 1-D sequence, in-context tokens included: cos and sin, [2, length, head_dim / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, rope):
    """Rotary positions in the half-split layout: channel i turns with channel i + head_dim / 2. x [n, heads, t, d]."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def sincos_2d(grid, width):
    """Position table [grid^2, width]: a quarter each of sin and cos of the column, sin and cos of the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], 1)                                             # grid d/2
    return torch.cat([one.repeat(grid, 1), one.repeat_interleave(grid, 0)], 1)


# ------------------------------------------------------------------------------------------------------------------
# Encoder

class MAE(nn.Module, Pretrained):
    """ResNet masked autoencoder (A.3): its encoder's multi-scale features are the space in which samples drift.

    Pixel models patchify first: `input_patch_size` 8 turns 256x256x3 into 32x32x192. `layers` are the residual blocks
    of each stage; widths double from `base_channels`. patch_size: side of a masking patch.
    """

    def __init__(self, in_channels=4, base_channels=256, layers=(3, 4, 6, 3), patch_size=2, input_patch_size=1,
                 num_classes=1000):
        super().__init__()
        self.in_channels, self.input_patch_size = in_channels, input_patch_size
        self.patch_size, self.num_classes = patch_size, num_classes
        channels = in_channels * input_patch_size**2
        self.encoder = ResNetEncoder(channels, base_channels, layers)
        self.decoder = UNetDecoder(channels, base_channels, len(layers))
        self.fc = nn.Linear(base_channels * 2 ** (len(layers) - 1), num_classes)

    def patchify(self, x):
        p = self.input_patch_size
        return rearrange(x, "n c (h p) (w q) -> n (p q c) h w", p=p, q=p)

    def forward(self, x, mask, labels):
        """x [n, c, h, w], mask [n, h', w'] on the grid of masking patches, labels [n].

        Returns reconstruction (patchified), class logits [n, classes], and per image: the squared error on hidden
        positions (summed over channels, averaged over positions) and the cross-entropy.
        """
        x = self.patchify(x)                                                                     # n c 32 32
        hidden = mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2)[:, None]
        maps = self.encoder(x * (1 - hidden))
        recon = float32_at_least(self.decoder(maps))                                                       # n c 32 32
        logits = float32_at_least(self.fc(maps[f"layer{self.encoder.num_stages}"].mean((2, 3))))              # n classes
        error = ((recon - x).square() * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1)
        return recon, logits, error, F.cross_entropy(logits, labels, reduction="none")

    def features(self, x):
        """x [n, c, h, w], not masked -> {name: [n, T, C]}: `norm_x` and the multi-scale features of every map (A.5).

        Computed in the weights' type: with bfloat16 weights maps are bfloat16, and the statistics of them float32.
        """
        x = self.patchify(x)
        norm_x = (float32_at_least(x).square().mean((2, 3)) + 1e-6).sqrt()[:, None]                        # n 1 c
        return {"norm_x": norm_x, **multi_scale_features(self.encoder(x.to(self.encoder.conv1.weight.dtype)))}


class ResNetEncoder(nn.Module):
    """Basic blocks in stages at full, 1/2, 1/4, ... resolution; a further GroupNorm after each stage feeds the next."""

    def __init__(self, in_channels, width, layers):
        super().__init__()
        self.num_stages = len(layers)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.gn1 = group_norm(width)
        self.stages = nn.ModuleList()
        for i, depth in enumerate(layers):
            c_in, c_out = width * 2 ** max(i - 1, 0), width * 2**i
            self.stages.append(nn.ModuleDict({"layers": nn.ModuleList(
                BasicBlock(c_in if k == 0 else c_out, c_out, 2 if k == 0 and i > 0 else 1) for k in range(depth))}))
            self.add_module(f"layer{i + 1}_norm", group_norm(c_out))

    def forward(self, x):
        """x [n, c, h, w] -> maps {name: [n, C, H, W]}: conv1, layerI, and every second block's output layerI_blkK."""
        maps = {"conv1": F.relu(self.gn1(self.conv1(x)))}
        x = maps["conv1"]
        for i, stage in enumerate(self.stages, 1):
            for k, block in enumerate(stage["layers"], 1):
                x = block(x)
                if k % 2 == 0:
                    maps[f"layer{i}_blk{k}"] = x
            maps[f"layer{i}"] = x = self.get_submodule(f"layer{i}_norm")(x)
        return maps


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.gn1 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.gn2 = group_norm(c_out)
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.proj_conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.proj_gn = group_norm(c_out)

    def forward(self, x):
        skip = self.proj_gn(self.proj_conv(x)) if self.projects else x
        x = F.relu(self.gn1(self.conv1(x)))
        return F.relu(self.gn2(self.conv2(x)) + skip)


class UNetDecoder(nn.Module):
    """Back up through the stages: resize to the skip's size, concatenate, normalise, two convolutions (A.3)."""

    def __init__(self, out_channels, width, num_stages):
        super().__init__()
        widths = [width] + [width * 2**i for i in range(num_stages)]  # of conv1, layer1, layer2, ...
        self.bridge = ConvGNReLU(widths[-1], widths[-1])
        self.steps = [(f"up{i}{i - 1}", f"layer{i - 1}" if i > 1 else "conv1") for i in range(num_stages, 0, -1)]
        for i, (name, _) in zip(range(num_stages, 0, -1), self.steps):
            self.add_module(name, nn.ModuleDict({
                "concat_norm_fn": group_norm(widths[i] + widths[i - 1]),
                "proj": ConvGNReLU(widths[i] + widths[i - 1], widths[i - 1]),
                "refine": ConvGNReLU(widths[i - 1], widths[i - 1])}))
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps):
        x = self.bridge(maps[f"layer{len(self.steps)}"])
        for name, skip in self.steps:
            up = self.get_submodule(name)
            x = F.interpolate(x, maps[skip].shape[2:], mode="bilinear", align_corners=False)
            x = up["concat_norm_fn"](torch.cat([x, maps[skip]], 1))
            x = up["refine"](up["proj"](x))
        return self.head(x)


class ConvGNReLU(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.gn = group_norm(c_out)

    def forward(self, x):
        return F.relu(self.gn(self.conv(x)))


def group_norm(channels):
    """GroupNorm with 32 groups, or the largest number below that divides the channels."""
    return GroupNorm(next(g for g in range(min(32, channels), 0, -1) if channels % g == 0), channels, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """In the input's type, as RMSNorm: in float32, as autocast would have it, maps take twice the memory."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


# ------------------------------------------------------------------------------------------------------------------
# Pretrained networks of others: ConvNeXt-V2 (features in pixel space) and the SD-VAE (between pixels and latents)

class ConvNeXtV2(nn.Module):
    """ConvNeXt-V2 as an encoder, beside the MAE, of pixel generators (A.5; P: FID 9.35 -> 3.70).

    Parameters bear the names of the public checkpoints (transformers'), config keys too. Frozen and without its classifier.
    """

    def __init__(self, depths=(3, 3, 27, 3), hidden_sizes=(128, 256, 512, 1024), num_channels=3, patch_size=4,
                 image_size=224, layer_norm_eps=1e-12):
        super().__init__()
        self.in_channels, self.image_size = num_channels, image_size
        self.embeddings = nn.ModuleDict({
            "patch_embeddings": nn.Conv2d(num_channels, hidden_sizes[0], patch_size, patch_size),
            "layernorm": ChannelNorm(hidden_sizes[0])})
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList()})
        for i, (depth, width) in enumerate(zip(depths, hidden_sizes)):
            stage = nn.ModuleDict({"layers": nn.ModuleList(ConvNeXtBlock(width) for _ in range(depth))})
            if i > 0:
                before = hidden_sizes[i - 1]
                stage["downsampling_layer"] = nn.Sequential(ChannelNorm(before), nn.Conv2d(before, width, 2, 2))
            self.encoder["stages"].append(stage)
        self.layernorm = nn.LayerNorm(hidden_sizes[-1], eps=layer_norm_eps)

    def features(self, x):
        """x [n, 3, h, w] in [-1, 1], of any size -> {name: [n, T, C]}; `convenxt` is spelt as in the release.

        A stage's map, every position normalised over its channels, from the second stage on; means and stds of all four,
        the last one's std once more as `global_std`; and `global_mean`, the final norm of the last map's mean as it is.
        """
        x = torch.stack([((channel + 1) / 2 - mean) / std for channel, mean, std in zip(
            float32_at_least(x).unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))], 1)                # ImageNet's; not clipped
        x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True, align_corners=False)
        x = self.embeddings["patch_embeddings"](x.to(self.embeddings["patch_embeddings"].weight.dtype))
        x = self.embeddings["layernorm"](x)                                                      # n 128 56 56
        found = {}
        for i, stage in enumerate(self.encoder["stages"]):
            if i > 0:
                x = stage["downsampling_layer"](x)
            for block in stage["layers"]:
                x = block(x)                                                                     # n c h w
            y = rearrange(float32_at_least(x), "n c h w -> n (h w) c")
            mean, std = mean_and_std(y, 2)
            y = (y - mean) / (std + 1e-3)                                                        # n T c
            if i > 0:
                found[f"convenxt_stage_{i}"] = y
            found[f"convenxt_stage_{i}_mean"], found[f"convenxt_stage_{i}_std"] = mean_and_std(y, 1)
        last = self.layernorm  # of a vector: in float32 whatever the weights are
        found["global_mean"] = F.layer_norm(float32_at_least(x).mean((2, 3)), last.normalized_shape, float32_at_least(last.weight), float32_at_least(last.bias),
                                            last.eps)[:, None]                                   # n 1 c
        found["global_std"] = found[f"convenxt_stage_{i}_std"]
        return found


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, a 4x wider MLP with global response normalisation (channels compete by their norm over space)."""

    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = nn.ParameterDict({name: nn.Parameter(torch.zeros(1, 1, 1, 4 * width)) for name in ("weight", "bias")})
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))                                   # n h w c
        y = F.gelu(self.pwconv1(y))
        wide = torch.promote_types(y.dtype, torch.float32)
        norm = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True, dtype=wide)                 # n 1 1 4c
        response = (norm / (norm.mean(3, keepdim=True) + 1e-6)).to(y.dtype)
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


LATENT_SCALE = 0.18215  # latents are this times the VAE's, so that their variance is about 1
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def load_vae(path="hf://stabilityai/sd-vae-ft-mse", device="cpu", chunk=16, compile=False):
    """The SD-VAE (diffusers' AutoencoderKL) from the Hub or a local folder, frozen; bfloat16 on a GPU.

    chunk: images in work at a time, which bounds the memory whatever their number (2 GB an image where gradients are
    kept, 0.2 GB where not). Raises ValueError or OSError, in one line, for what cannot be had or is another VAE.
    """
    folder = resolve(path, VAE_FILES)
    from diffusers import AutoencoderKL  # takes three seconds: only who decodes waits for it
    from diffusers.utils import logging
    logging.set_verbosity_error()
    try:
        net, found = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False,
                                                   output_loading_info=True)
        wrong = [f"{kind.split('_')[0]} {', '.join(map(str, names))[:100]}" for kind, names in found.items() if names]
        if wrong:  # diffusers would fill them with random numbers
            raise ValueError(f"weights {'; '.join(wrong)}")
    except Exception as error:  # diffusers and safetensors have many kinds for a folder that is not whole
        raise ValueError(f"{path}: no AutoencoderKL in diffusers' format ({_one_line(error)})") from None
    if net.config.scaling_factor != LATENT_SCALE:
        raise ValueError(f"{path}: its latents are scaled by {net.config.scaling_factor}, these models' by {LATENT_SCALE}")
    return VAE(net, chunk, compile).to(device)


class VAE(nn.Module):
    """Images [n, 3, 8h, 8w] in [-1, 1] <-> latents [n, 4, h, w], some at a time. Gradients pass through `decode`."""

    def __init__(self, net, chunk, compile):
        super().__init__()
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.chunk, self.downsampling = chunk, 2 ** (len(net.config.block_out_channels) - 1)
        self._decode = torch.compile(self._decode_chunk) if compile else self._decode_chunk

    def to(self, device, bf16=None):
        bf16 = torch.device(device).type == "cuda" if bf16 is None else bf16
        return super().to(device, torch.bfloat16 if bf16 else torch.float32)

    def decode(self, latents):
        """Latents [n, 4, h, w] -> images float32 [n, 3, 8h, 8w], about in [-1, 1], on the latents' device."""
        return torch.cat([self._remembering_little(self._decode, z) for z in self._chunks(latents / LATENT_SCALE)])

    @torch.no_grad()
    def encode(self, images):
        """Images [n, 3, 8h, 8w] -> mean and standard deviation [n, 4, h, w] of their latents' posterior, float32."""
        moments = [self.net.encode(x).latent_dist for x in self._chunks(images)]
        return tuple(torch.cat([getattr(m, key).float() for m in moments]) * LATENT_SCALE for key in ("mean", "std"))

    def _decode_chunk(self, z):
        return self.net.decode(z).sample.float()

    def _chunks(self, x):
        # On a CPU one at a time: that is faster there, and an image's bits do not depend on its neighbours.
        size = 1 if x.device.type == "cpu" else self.chunk
        return x.to(self.net.dtype, memory_format=torch.channels_last).split(size)

    def _remembering_little(self, function, x):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return function(x)
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


# ------------------------------------------------------------------------------------------------------------------
# Reading weights. Four sources: a run folder or checkpoint of ours, its like on the Hub (config.json + model.safetensors),
# the authors' artifact (metadata.json + ema_params.msgpack), local or on the Hub, and transformers' ConvNeXt-V2.

HUB_REPO = "Goodeat/drifting"  # the authors' weights: hf://NAME
PUBLISHED = {name: f"models/gen/jax/{name}" for name in ("latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota",
                                                         "ablation")}
PUBLISHED |= {name: f"models/mae/jax/{name}" for name in ("mae_latent_640", "mae_pixel_640", "mae_latent_256")}
OUR_FILES, FLAX_FILES = ("config.json", "model.safetensors"), ("metadata.json", "ema_params.msgpack")


def load_generator(path, keep_converted=True):
    """Generator in eval mode. path: a run or checkpoint folder of ours, a folder of the authors' artifact, or on the Hub
    hf://NAME (one of PUBLISHED) or hf://USER/REPO[/SUBFOLDER][@REVISION].

    keep_converted: published weights are kept as safetensors too, beside the Hub's cache, and read from there next time.
    Raises FileNotFoundError, OSError or ValueError, in one line, for a folder without a model, with another kind of model,
    with damaged files, with parameters that do not account for the model's one by one, and for what cannot be downloaded.
    """
    return _load(path, keep_converted, {"gen": Generator})


def load_encoder(path, keep_converted=True):
    """ResNet-MAE, or ConvNeXt-V2 as transformers saves it, in eval mode; paths and errors as for `load_generator`.

    What training uses is `features(x)`; `in_channels` says what it takes (4: latents, 3 or 1: pixels).
    """
    return _load(path, keep_converted, {"mae": MAE, "convnextv2": ConvNeXtV2})


def latest_checkpoint(run):
    """The newest `step_*` folder of a run folder, or None."""
    return max(Path(run).glob("step_" + "[0-9]" * 8), default=None)


def resolve(path, *alternatives):
    """Local folder that holds one of the alternatives, tuples of file names; hf://... is downloaded, these files alone.

    Everything that huggingface_hub's users know works: its cache, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, resumed downloads.
    """
    wanted = " or ".join(" + ".join(files) for files in alternatives)
    if not str(path).startswith("hf://"):
        folder = latest_checkpoint(path) or Path(path)
        if any(_holds(folder, files) for files in alternatives):
            return folder
        raise FileNotFoundError(f"{path}: no model there (wanted {wanted}, in it or in its newest step_*); on the Hub it is "
                                "hf://NAME or hf://USER/REPO")
    from huggingface_hub import hf_hub_download
    from huggingface_hub import errors
    address, _, revision = str(path)[5:].partition("@")
    address = address.strip("/")
    if address in PUBLISHED:
        address, alternatives = f"{HUB_REPO}/{PUBLISHED[address]}", [FLAX_FILES]
    user, repo, subfolder = (address.split("/", 2) + ["", ""])[:3]
    offline = False
    if not repo:
        raise ValueError(f"{path}: not one of {', '.join(PUBLISHED)}, and no hf://USER/REPO[/SUBFOLDER][@REVISION]")
    try:
        for files in alternatives:
            try:
                for name in files:
                    file = hf_hub_download(f"{user}/{repo}", name, subfolder=subfolder or None, revision=revision or None,
                                           local_files_only=offline)
                return Path(file).parent
            except errors.EntryNotFoundError as error:  # the next alternative: `name` is not there,
                offline = offline or isinstance(error, errors.LocalEntryNotFoundError)  # or the Hub out of reach: once is enough
                if files is alternatives[-1]:
                    raise
    except errors.LocalEntryNotFoundError:
        raise OSError(f"{path}: {name} is not in the cache, and the Hub cannot be reached (HF_HUB_OFFLINE set? no network?); "
                      f"download it elsewhere and give the folder that holds {wanted}") from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{path}: the repository holds no {name} there; wanted {wanted}") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{path}: {user}/{repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:  # also of a private one
        raise FileNotFoundError(f"{path}: no repository {user}/{repo} on the Hub, or a private one: `hf auth login`, or set "
                                "HF_TOKEN") from None
    except Exception as error:  # of the network, of a disk without room, of a name that cannot be one
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise OSError(f"{path}: the Hub refuses access ({_one_line(error)}): is HF_TOKEN, or what `hf auth login` keeps, "
                          "of an account that may read it?") from None
        raise OSError(f"{path}: {name} could not be downloaded ({_one_line(error)}); run again") from None


def _holds(folder, files):
    return all((folder / name).is_file() for name in files)


def _load(path, keep_converted, kinds):
    folder = resolve(path, OUR_FILES, FLAX_FILES)
    ours = _holds(folder, OUR_FILES)
    if ours:
        config = _read_json(folder / "config.json")
        cls = kinds.get(str(config.get("model_type")), next(iter(kinds.values())))
        if cls is ConvNeXtV2:
            if config.get("hidden_act", "gelu") != "gelu":
                raise ValueError(f"{path}: hidden_act is {config['hidden_act']}, and only gelu is built here")
            config = {key: value for key, value in config.items() if key in inspect.signature(cls).parameters}
    else:
        metadata = _read_json(folder / "metadata.json")
        kind, form = str(metadata.get("kind")), metadata.get("format")
        if kind not in kinds or form != "flax.msgpack" or not isinstance(metadata.get("model_config"), dict):
            raise ValueError(f"{path}: its metadata.json says kind {kind}, format {form}; wanted is {' or '.join(kinds)}, "
                             "flax.msgpack, and a model_config")
        cls, config = kinds[kind], _flax_config(metadata["model_config"], path)

    unknown = sorted(config.keys() - inspect.signature(cls).parameters.keys())
    if unknown:
        raise ValueError(f"{path}: not a {cls.__name__} that this code can build; config keys {', '.join(unknown)}")
    try:
        with torch.device("meta"):  # no memory, no initialisation: the file's tensors become the parameters
            model = cls(**config)
    except Exception as error:  # whatever a number that makes no sense leads to
        raise ValueError(f"{path}: its config does not build a {cls.__name__} ({_one_line(error)})") from None
    wanted = _shapes(model.state_dict())
    if ours:
        state = _read_safetensors(folder / "model.safetensors")
        if cls is ConvNeXtV2:
            state = {name.removeprefix("convnextv2."): p for name, p in state.items() if not name.startswith("classifier.")}
    else:
        state = _read_artifact(folder, cls, config, wanted, keep_converted and str(path).startswith("hf://"))
    found = _shapes(state)
    wrong = [f"{name} is {found.get(name, 'missing')}, should be {wanted.get(name, 'absent')}"
             for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} parameters do not fit its config: {'; '.join(wrong[:5])}")
    model.load_state_dict({name: p.float() for name, p in state.items()}, assign=True)  # float32, however they were saved
    return model.eval()


def _shapes(state):
    return {name: list(p.shape) for name, p in state.items()}


def _read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({_one_line(error)}); copy or download it again") from None


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); copy or download it again") from None


def _read_artifact(folder, cls, config, wanted, keep):
    """State dict of the authors' artifact. keep: from a copy in our format among huggingface_hub's assets, made if need be."""
    from contextlib import ExitStack

    def convert():
        names = FLAX_GENERATOR_NAMES if cls is Generator else FLAX_MAE_NAMES
        return _flax_state_dict(read_flax(folder / "ema_params.msgpack"), names)

    if not keep:
        return convert()
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock
    from safetensors.torch import save_file
    at = max(i for i, part in enumerate(folder.parts) if part == "snapshots")  # models--USER--REPO/snapshots/COMMIT/...:
    try:                                                                       # the bytes of a commit never change
        copy = cached_assets_path("drifting", folder.parts[at - 1], "--".join(("v1", *folder.parts[at + 1:])))
    except (OSError, ValueError) as error:  # a cache that cannot be written to
        print(f"no converted copy kept ({_one_line(error)})", file=sys.stderr)
        return convert()
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(copy / ".lock"))  # of many processes, one converts
        except OSError:  # cannot be written to, but perhaps read
            pass
        try:
            state = _read_safetensors(copy / "model.safetensors")
            if _shapes(state) == wanted:
                return state
        except (OSError, ValueError):  # not there yet, or damaged
            pass
        state = convert()
        if _shapes(state) == wanted:  # else `_load` says what is wrong
            try:
                save_file(state, copy / "model.tmp")
                (copy / "config.json").write_text(json.dumps(config))
                (copy / "model.tmp").replace(copy / "model.safetensors")
                return _read_safetensors(copy / "model.safetensors")  # as next time: rounding depends on where weights lie
            except Exception as error:  # no room: the next start decodes again
                print(f"{copy}: no converted copy kept ({_one_line(error)})", file=sys.stderr)
                if (copy / "model.tmp").exists():
                    (copy / "model.tmp").unlink()
    return state


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# Released configs say which layers they use; here these are not options.
FLAX_FIXED = dict(use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True)
# Precision is the caller's (autocast), use_remat is `checkpoint_blocks`, and dropout acts in training alone.
FLAX_IGNORED = ("use_bf16", "use_remat", "dropout_prob")

# Flax path -> our name, tried in order on the whole path. kernel, scale and embedding are renamed to weight below.
FLAX_GENERATOR_NAMES = [
    (r"Embed_0/", "class_embed."), (r"noise_embeds_(\d+)/embedding", r"style_embed.\1"), (r"^RMSNorm_0/", "alpha_norm."),
    (r"TimestepEmbedder_0/TorchLinear_0/Dense_0/", "alpha_embed.0."),
    (r"TimestepEmbedder_0/TorchLinear_1/Dense_0/", "alpha_embed.2."),
    (r"^LightningDiT_0/", ""), (r"^TorchLinear_0/Dense_0/", "patch_embed."), (r"^TorchLinear_1/Dense_0/", "cls_proj."),
    (r"FinalLayer_0/RMSNorm_0/", "final_norm."), (r"FinalLayer_0/TorchLinear_0/Dense_0/", "final_adaln."),
    (r"FinalLayer_0/TorchLinear_1/Dense_0/", "final_linear."),
    (r"blocks_(\d+)/", r"blocks.\1."), (r"\.TorchLinear_0/Dense_0/", ".adaln."),
    (r"\.RMSNorm_0/", ".norm1."), (r"\.RMSNorm_1/", ".norm2."),
    (r"Attention_0/TorchLinear_0/Dense_0/", "qkv."), (r"Attention_0/TorchLinear_1/Dense_0/", "proj."),
    (r"Attention_0/([qk]_norm)/", r"\1."), (r"SwiGLUFFN_0/TorchLinear_0/Dense_0/", "mlp_gate."),
    (r"SwiGLUFFN_0/TorchLinear_1/Dense_0/", "mlp_in."), (r"SwiGLUFFN_0/TorchLinear_2/Dense_0/", "mlp_out."),
]
FLAX_MAE_NAMES = [(r"(stages|layers)_(\d+)/", r"\1.\2."), (r"/", ".")]


def _flax_config(config, path="model_config"):
    """A published model_config as our constructor's arguments. ValueError names a choice that is not built here."""
    for key, value in FLAX_FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: model_config has {key} = {config[key]}, and only {value} is built here")
    return {key: value for key, value in config.items() if key not in FLAX_FIXED and key not in FLAX_IGNORED}


def _flax_state_dict(params, names):
    """{flax path: array} -> our state dict. flax kernels are (in, out) and (h, w, in, out); ours (out, in, [h, w])."""
    state = {}
    for path in list(params):
        array, name = params.pop(path).float(), path  # popped: a converted array's original is freed at once
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        if name.endswith("kernel") and array.ndim in (2, 4):
            array = array.permute(*((1, 0) if array.ndim == 2 else (3, 2, 0, 1)))
        name = re.sub(r"(kernel|scale|embedding)$", "weight", name)
        if name in state:
            raise ValueError(f"{path}: a second array for {name}")
        state[name] = array.clone(memory_format=torch.contiguous_format)
    styles = [f"style_embed.{i}" for i in range(sum(name.startswith("style_embed.") for name in state))]
    if styles and len({tuple(state[name].shape) if name in state else None for name in styles}) == 1 and styles[0] in state:
        state["style_embed"] = torch.stack([state.pop(name) for name in styles])  # else the check of shapes names them
    return state


FLAX_DTYPES = ("bool", "bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
               "uint32", "uint64")


def read_flax(path):
    """A flax msgpack file as {path/of/keys: tensor}: maps, arrays and numbers, no other Python object is ever built.

    An array is ext type 1 (3: a scalar) holding msgpack (shape, dtype name, bytes); arrays of over 2^30 bytes are maps
    of chunks. Tensors lie on the bytes read: clone before writing to them. Raises ValueError for a truncated or foreign
    file.
    """
    import msgpack

    def array(code, data):
        if code not in (1, 3):
            raise ValueError(f"ext type {code}")
        mapped.madvise(mmap.MADV_DONTNEED)  # pages of the file that have been read need not stay in memory
        shape, dtype, raw = msgpack.unpackb(data)
        dtype = {"V2": "bfloat16"}.get(dtype, dtype)  # V2: as older flax names it
        if dtype not in FLAX_DTYPES or min(shape, default=0) < 0 or len(raw) != math.prod(shape) * getattr(torch, dtype).itemsize:
            raise ValueError(f"{len(raw)} bytes for an array {shape} of {dtype}")
        if not raw:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(raw, dtype=getattr(torch, dtype)).reshape(tuple(shape))

    def flatten(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and "__msgpack_chunked_array__" in value:
                shape = [value["shape"][k] for k in sorted(value["shape"], key=int)]
                chunks = [value["chunks"][k] for k in sorted(value["chunks"], key=int)]
                yield prefix + key, torch.cat(chunks).reshape(shape)
            elif isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}/")
            elif isinstance(value, (torch.Tensor, int, float)):
                yield prefix + key, torch.as_tensor(value)
            else:
                raise ValueError(f"{prefix}{key} holds a {type(value).__name__}, not an array")

    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that bytes cannot be written to
            tree = msgpack.unpackb(mapped, ext_hook=array, strict_map_key=True)
        arrays = list(flatten(tree))
        if len(dict(arrays)) < len(arrays):
            raise ValueError("two arrays of one path")
        return dict(arrays)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; the authors' artifact is {' + '.join(FLAX_FILES)}") from None
    except Exception as error:  # msgpack raises a dozen kinds for bytes that are not what they should be
        raise ValueError(f"{path}: truncated, or not a flax msgpack file ({_one_line(error)})") from None


# --------------------------------------------------------------------------------------------
# What all scripts share: mistakes of the user's, processes, files that are whole or not there

class UsageError(Exception):
    """A mistake of the user's, or a file that is not what it should be: shown as one line.

    Every other exception is a bug, ours or yours, and keeps its traceback.
    """


def run_script(main):
    """Runs a script's main(), with a process group if torchrun started it.

    A UsageError and a full disk end the script with one line, anything else with its traceback
    and, of several processes, the number of the one where it happened.
    """
    script = Path(sys.argv[0]).name
    try:
        start_processes()
        main()
    except UsageError as error:
        raise SystemExit(f"{script}: {error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SystemExit(f"{script}: {error}: make room, and run the same command again; what was "
                         "whole before is untouched") from None
    except Exception as error:
        if world_size() > 1:
            error.add_note(f"on rank {get_rank()} of {world_size()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_processes():
    """Join torchrun's processes (RANK, LOCAL_RANK, WORLD_SIZE); nothing without torchrun."""
    if "RANK" not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # If it were imported after the group exists, its default arguments would keep the group's
    # threads alive until the interpreter ends, which then aborts.
    from torch.distributed.nn import functional  # noqa: F401
    # How long the others wait for a process that is lost, or slower.
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(value):
    """The values of all processes, as a list (pickled: only what this run's processes made)."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_all_ranks(function, *args, **options):
    """function(...) on every process. Where it raises a UsageError, all processes end.

    Without this, the others would wait for the one that gave up. The first that failed says why.
    """
    result, mistake = None, None
    try:
        result = function(*args, **options)
    except UsageError as error:
        mistake = error
    failed = [rank for rank, message in enumerate(gather(str(mistake or ""))) if message]
    if not failed:
        return result
    if failed[0] == get_rank():
        raise mistake
    raise SystemExit(1)


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as f`: f is written under a name of its own, synced, then renamed.

    So a file called `path` is never half-written, and two writers do not mix.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def number(kind, least=-math.inf, most=math.inf, above=-math.inf):
    """`type=` of an option: a finite int or float in [least, most] that is more than `above`."""
    limits = {"at least": least, "at most": most, "more than": above}
    wanted = " and ".join(f"{text} {limit}" for text, limit in limits.items()
                          if math.isfinite(limit))

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f"must be {wanted or 'finite'}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


positive_int = number(int, least=1)
