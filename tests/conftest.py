"""What several tests share: the fixtures' folder, arrays in torch's layout, and a writer of the authors' weight format."""
import json
import re
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT))


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
    """{path/of/keys: numpy array} -> flax msgpack file of nested maps."""
    tree = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = flax_array(array) if isinstance(array, np.ndarray) else array
    Path(path).write_bytes(msgpack.packb(tree))


def random_generator_artifact(folder, **config):
    """An artifact of a generator as the authors publish it, of any size, with random weights (none of them zero)."""
    import model
    tiny = FIXTURES / "gen_latent_tiny"
    metadata = json.loads((tiny / "metadata.json").read_text())
    config = metadata["model_config"] = {**metadata["model_config"], **config}
    with torch.device("meta"):
        shapes = {k: list(p.shape) for k, p in model.Generator(**model._flax_config(config)).state_dict().items()}
    styles, rng, arrays = shapes.pop("style_embed"), np.random.default_rng(0), {}
    for path in model.read_flax(tiny / "ema_params.msgpack"):  # one block and one style table stand for all
        if re.search(r"blocks_(?!0/)|noise_embeds_(?!0/)", path):
            continue
        for i in range(config["depth"] if "blocks_0" in path else styles[0] if "noise_embeds_0" in path else 1):
            name = re.sub(r"(blocks|noise_embeds)_0/", rf"\1_{i}/", path)
            (ours, _), = model._flax_state_dict({name: torch.zeros(1, 1)}, model.FLAX_GENERATOR_NAMES).items()
            shape = styles[1:] if ours == "style_embed" else shapes[ours]
            if name.endswith("kernel"):
                shape = shape[::-1]
            scale = 0.02 if len(shape) == 1 else shape[0] ** -0.5
            centre = float(name.endswith(("scale", "norm/weight")) or "RMSNorm" in name)
            arrays[name] = rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(centre)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    write_flax(folder / "ema_params.msgpack", arrays)
    return folder


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
