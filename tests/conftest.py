"""What several tests share: the fixtures' folder, arrays in torch's layout, and a writer of the authors' weight format."""
import json
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
