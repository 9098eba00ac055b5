"""What several tests share: fixtures, arrays in torch's layout, the formats of others."""
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
# Of processes that tests start: their work is too small to be shared out.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Bounds are those of float32 on a CPU, and presets differ on a GPU: most tests must not see one.
# `GPU_TESTS=1 python -m pytest tests -k gpu` runs those that want it.
if not os.environ.get("GPU_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and GPU_TESTS=1")
sys.path.insert(0, str(ROOT))
import model  # noqa: E402


def nchw(array):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def relative_error(a, b):
    """Norm of the difference over the norm of the reference b, in float64."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm()).item()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


# --------------------------------------------------------------------------------------------
# The authors' format

def flax_array(array):
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def write_flax(path, arrays):
    """{path/of/keys: function that makes a numpy array} -> flax's msgpack, an array at a time."""
    tree, packer = {}, msgpack.Packer()
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = array

    def write(node):
        if callable(node):
            return file.write(packer.pack(flax_array(node())))
        file.write(packer.pack_map_header(len(node)))
        for key, value in node.items():
            file.write(packer.pack(key))
            write(value)

    with open(path, "wb") as file:
        write(tree)


KINDS = {"gen": ("gen_ablation", model.Generator), "mae": ("mae_latent_256", model.MAE)}


def published(kind, **sizes):
    """A published artifact without its numbers, "gen": ablation or "mae": mae_latent_256.

    Returns metadata.json as it is on the Hub but for `sizes`, the tree {path: shape}, and the
    network that the metadata describe, without memory.
    """
    name, cls = KINDS[kind]
    artifact = json.loads((FIXTURES / f"published/{name}.json").read_text())
    metadata = artifact["metadata"]
    metadata["model_config"].update(sizes)
    with torch.device("meta"):
        net = cls(**model.release_config(metadata, cls))
    return metadata, {path: shape for path, (shape, _) in artifact["tree"].items()}, net


def random_artifact(folder, kind, **sizes):
    """A published artifact with random weights, or its like of other sizes, under the real names.

    The first block and the first style table stand for all.
    """
    metadata, tree, net = published(kind, **sizes)
    rng = np.random.default_rng(0)

    def numbers(path, shape):
        if path.endswith("kernel"):
            shape = (*shape[2:], shape[1], shape[0])
        if len(shape) > 1:
            return rng.standard_normal(shape, np.float32) * np.float32(np.prod(shape[:-1]) ** -0.5)
        centre = float(not path.endswith("bias"))
        return (centre + 0.02 * rng.standard_normal(shape)).astype(np.float32)

    paths = {model.our_name(path, model.FLAX_NAMES): path for path in tree}
    arrays = {}
    for name, tensor in net.state_dict().items():
        block = re.match(r"blocks\.(\d+)", name)
        if name == "style_embed":
            for i in range(len(tensor)):
                path = f"noise_embeds_{i}/embedding"
                arrays[path] = partial(numbers, path, tensor.shape[1:])
        else:
            path = paths[re.sub(r"blocks\.\d+", "blocks.0", name)]
            path = path.replace("blocks_0/", f"blocks_{block and block[1]}/")
            arrays[path] = partial(numbers, path, tensor.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    write_flax(folder / "ema_params.msgpack", arrays)
    return folder


def published_generator(size):
    """The sizes of a published generator of latents: `**published_generator("B")`."""
    sizes = {"n_cls_tokens": 16, **model.GENERATOR_SIZES[size]}
    return dict(input_size=32, cond_dim=sizes["hidden_size"], num_classes=1000, noise_classes=64,
                noise_coords=32, **sizes)


# Sizes that make an artifact of 2 MB under the published names.
SMALL_GENERATOR = dict(cond_dim=48, hidden_size=48)
SMALL_MAE = dict(base_channels=8)


@pytest.fixture(scope="session")
def mae_artifact(tmp_path_factory):
    """`mae_latent_tiny`: its 12 MB of weights follow from shapes.json by the fixtures' recipe."""
    folder = tmp_path_factory.mktemp("mae_latent_tiny")
    source = FIXTURES / "mae_latent_tiny"
    rng = np.random.RandomState(10)
    arrays = {}
    for name, shape in json.loads((source / "shapes.json").read_text()).items():
        if len(shape) > 1:
            array = rng.randn(*shape) / np.sqrt(np.prod(shape[:-1])) * 1.4
        else:
            array = float(name.endswith("scale")) + 0.3 * rng.randn(*shape)
        arrays[name] = partial(array.astype, np.float32)
    write_flax(folder / "ema_params.msgpack", arrays)
    (folder / "metadata.json").write_bytes((source / "metadata.json").read_bytes())
    return folder


# --------------------------------------------------------------------------------------------
# diffusers' and transformers' formats

def small_vae(folder):
    """A real AutoencoderKL of the SD-VAE's form, 1000 times smaller, with random weights."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    net = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    net.save_pretrained(folder)
    return folder


def old_vae(folder, safetensors):
    """The small VAE as stabilityai/sd-vae-ft-mse, of October 2022: .bin and .safetensors, a config
    without a scaling_factor. Assumed: that attention has diffusers' names of that time."""
    source = small_vae(folder / "now")
    config = json.loads((source / "config.json").read_text())
    del config["scaling_factor"]
    (folder / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.4.2"}))
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    for now, before in {"to_q": "query", "to_k": "key", "to_v": "value",
                        "to_out.0": "proj_attn"}.items():
        for name in [name for name in state if f".{now}." in name]:
            state[name.replace(now, before)] = state.pop(name)
    if safetensors:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        (folder / "diffusion_pytorch_model.bin").write_bytes(b"not looked at")
    else:
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    return folder


def convnext_of_transformers(folder, safetensors):
    """The fixture's network as facebook/convnextv2-base-22k-224, a classifier. Until 2025 it had
    pytorch_model.bin alone, with gamma and beta; a pull request renames them."""
    source = FIXTURES / "convnextv2_tiny"
    config = json.loads((source / "config.json").read_text())
    others = {"drop_path_rate": 0.0, "id2label": {"0": "tench", "1": "goldfish"}}
    (folder / "config.json").write_text(json.dumps({**config, **others}))
    state = load_file(source / "model.safetensors")  # "convnextv2." before every name
    state |= {"classifier.weight": torch.zeros(2, 64), "classifier.bias": torch.zeros(2)}
    if safetensors:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    else:
        state = {name.replace("grn.weight", "grn.gamma").replace("grn.bias", "grn.beta"): tensor
                 for name, tensor in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    return folder


# --------------------------------------------------------------------------------------------
# Processes

def places(n):
    """What torchrun, whose own start takes two seconds, sets in the environments of n processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(n),
                 LOCAL_WORLD_SIZE=str(n), RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]


def ranks(n, *command, **options):
    """n processes of a script."""
    return [subprocess.Popen(
        [sys.executable, *map(str, command)], env={**os.environ, **place},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        for place in places(n)]


def forked_ranks(context, n, main, *args):
    """n processes, of a multiprocessing context, of a script whose main function is main(*args)."""
    processes = [context.Process(target=run_as_rank, args=(place, main, *args))
                 for place in places(n)]
    for process in processes:
        process.start()
    return processes


def run_as_rank(place, main, *args):
    if place["WORLD_SIZE"] != "1":
        os.environ.update(place)
    model.run_script(partial(main, *args))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process: what they share, and start beside them, is made once."""
    from xdist.scheduler import LoadFileScheduling
    return LoadFileScheduling(config, log)
