"""How many generated images are of the class asked for, by a CNN that is trained on the real ones.

    python tests/judge.py data/cifar10                  # trains it once: data/cifar10/judge.safetensors
    python tests/judge.py data/cifar10 runs/cifar10     # judges 10,000 images, number i of class i % 10
    python tests/judge.py data/cifar10 runs/cifar10 3   # the same under guidance of 3

Prints how often the judge is right on the split `test` (CIFAR-10: some 80%), how many generated
images it takes for their class, and the Frechet distance of its 128 features to those of `train`.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid  # noqa: E402
import model  # noqa: E402
from prepare_data import Dataset  # noqa: E402


def unit(width_in, width):
    conv = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Judge(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.layers = nn.Sequential(
            unit(channels, 32), nn.MaxPool2d(2), unit(32, 64), unit(64, 64), nn.MaxPool2d(2),
            unit(64, 128), unit(128, 128))
        self.fc = nn.Linear(128, classes)

    def features(self, images):
        """uint8 [n, C, H, W] -> [n, 128]"""
        return self.layers(images.float() / 127.5 - 1).mean((2, 3))


def train(judge, data, epochs=8, batch_size=128):
    """Images are mirrored and shifted by at most two pixels."""
    steps = math.ceil(len(data) / batch_size) * epochs
    optimizer = torch.optim.SGD(judge.parameters(), 0.1, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps, pct_start=0.2)
    for step in tqdm(range(steps), "judge"):
        ids = data.fresh(step * batch_size, batch_size, seed=0)
        x = torch.from_numpy(data.images[ids])
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        top, left = torch.randint(5, (2,)).tolist()
        height, width = x.shape[2:]
        x = F.pad(x, (2, 2, 2, 2))[:, :, top:top + height, left:left + width]
        logits = judge.fc(judge.features(x))
        labels = torch.from_numpy(data.labels[ids])
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def judged(judge, read, labels):
    """Features of images 0, 1, ..., and which of them are taken for their class."""
    parts = np.array_split(np.arange(len(labels)), math.ceil(len(labels) / 500))
    rows = torch.cat([judge.features(read(part)) for part in parts])
    return rows, judge.fc(rows).argmax(1).numpy() == labels


def main(folder, ckpt=None, cfg_scale=1):
    data = Dataset(folder)
    torch.manual_seed(0)
    judge = Judge(data.shape[0], data.num_classes)
    file = Path(folder, "judge.safetensors")
    if not file.exists():
        train(judge, data)
        save_file(judge.state_dict(), file)
    judge.load_state_dict(load_file(file))
    judge.eval()
    test = Path(folder, "test")
    _, right = judged(judge, fid.open_images(test)[1], Dataset(folder, "test").labels)
    print(f"held out: {right.mean():.1%} right")
    if ckpt:
        labels = np.arange(10_000) % data.num_classes
        images = fid.generated(model.load_generator(ckpt), float(cfg_scale))
        rows, right = judged(judge, images, labels)
        by_class = [f"{name} {right[labels == i].mean():.0%}"
                    for i, name in enumerate(data.meta["classes"])]
        real, _ = judged(judge, fid.open_images(folder)[1], data.labels)
        distance = fid.frechet_distance(*fid.statistics(rows), *fid.statistics(real))
        print(f"{ckpt}: {right.mean():.1%} in their class ({', '.join(by_class)}), FD "
              f"{distance:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
