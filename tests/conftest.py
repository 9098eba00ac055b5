"""What several tests share: the fixtures' folder, arrays in torch's layout, and a writer of the authors' weight format."""
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start; their work is too small to be shared out
torch.set_num_threads(1)
sys.path.insert(0, str(ROOT))
import model  # noqa: E402


def nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def relative_error(a, b):
    """Norm of the difference over the norm of the reference b, in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm()).item()


def flax_array(array, name=None):
    raw = msgpack.packb((array.shape, name or array.dtype.name, array.tobytes()))
    return msgpack.ExtType(1, raw)


def write_flax(path, arrays):
    """{path/of/keys: numpy array, a function that makes it, or a msgpack value} -> flax msgpack file of nested maps.

    One array at a time is in memory: 10 GB can be written.
    """
    tree, packer = {}, msgpack.Packer()
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = array

    def write(node):
        if isinstance(node, dict):
            file.write(packer.pack_map_header(len(node)))
            for key, value in node.items():
                file.write(packer.pack(key))
                write(value)
        else:
            node = node() if callable(node) else node
            file.write(packer.pack(flax_array(node) if isinstance(node, np.ndarray) else node))

    with open(path, "wb") as file:
        write(tree)


def random_artifact(folder, kind, **config):
    """An artifact as the authors publish it, of a generator ("gen") or MAE ("mae") of any size, with random weights."""
    cls, tiny = {"gen": (model.Generator, "gen_latent_tiny"), "mae": (model.MAE, "mae_latent_tiny")}[kind]
    metadata = json.loads((FIXTURES / tiny / "metadata.json").read_text())
    config = metadata["model_config"] = {**metadata["model_config"], **config}
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in cls(**model._flax_config(config)).state_dict().items()}
    rng, arrays = np.random.default_rng(0), {}

    def add(path, shape):
        if path.endswith("kernel"):
            shape = shape[::-1] if len(shape) == 2 else [*shape[2:], shape[1], shape[0]]
        centre, scale = (float(not path.endswith("bias")), 0.02) if len(shape) == 1 else (0, np.prod(shape[:-1]) ** -0.5)
        arrays[path] = lambda: rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(centre)

    if kind == "mae":
        for name, shape in shapes.items():
            path = re.sub(r"(stages|layers)\.(\d+)", r"\1_\2", name).replace(".", "/")
            add(re.sub("weight$", "kernel" if len(shape) > 1 else "scale", path), shape)
    else:
        styles = shapes.pop("style_embed")
        for path in model.read_flax(FIXTURES / tiny / "ema_params.msgpack"):  # a block and a style table stand for all
            if not re.search(r"blocks_(?!0/)|noise_embeds_(?!0/)", path):
                for i in range(config["depth"] if "blocks_0" in path else styles[0] if "noise_embeds_0" in path else 1):
                    name = re.sub(r"(blocks|noise_embeds)_0/", rf"\1_{i}/", path)
                    (ours, _), = model._flax_state_dict({name: torch.zeros(1, 1)}, model.FLAX_GENERATOR_NAMES).items()
                    add(name, styles[1:] if ours.startswith("style_embed") else shapes[ours])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    write_flax(folder / "ema_params.msgpack", arrays)
    return folder


def published_generator(size):
    """The model_config of a generator of latents as published: `**published_generator("B")`."""
    sizes = {"n_cls_tokens": 16, **model.GENERATOR_SIZES[size]}
    return dict(input_size=32, cond_dim=sizes["hidden_size"], num_classes=1000, noise_classes=64, noise_coords=32, **sizes)


def ranks(n, *command, **options):
    """n processes of a script with arguments, set up as by torchrun, whose own start would take two seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
    return [subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **place, "RANK": str(i), "LOCAL_RANK": str(i)},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) for i in range(n)]


def small_vae(folder):
    """A real AutoencoderKL, 1000 times smaller than the SD-VAE: 8 pixels a latent, 4 channels, random weights."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=256,
                  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mae_artifact(tmp_path_factory):
    """The folder of `mae_latent_tiny`: its 12 MB of weights follow from shapes.json by the recipe of the fixtures."""
    folder = tmp_path_factory.mktemp("mae_latent_tiny")
    rng = np.random.RandomState(10)
    arrays = {}
    for name, shape in json.loads((FIXTURES / "mae_latent_tiny/shapes.json").read_text()).items():
        if len(shape) > 1:
            array = rng.randn(*shape) / np.sqrt(np.prod(shape[:-1])) * 1.4
        else:
            array = float(name.endswith("scale")) + 0.3 * rng.randn(*shape)
        arrays[name] = array.astype(np.float32)
    write_flax(folder / "ema_params.msgpack", arrays)
    (folder / "metadata.json").write_bytes((FIXTURES / "mae_latent_tiny/metadata.json").read_bytes())
    return folder
