"""Look at the authors' real weights once: `python tests/real_weights.py`, where there is a network.

Downloads a published generator (hf://ablation: 0.53 GB), counts its tensors and parameters, draws 8
images, and prints mean and standard deviation of their latents. Then it downloads the SD-VAE (0.33
GB) and saves the images as a grid. What it prints is worth a report, whatever it is.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import sample  # noqa: E402

CLASSES = {22: "bald eagle", 88: "macaw", 108: "sea anemone", 130: "flamingo",
           207: "golden retriever", 279: "arctic fox", 388: "giant panda", 979: "valley"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", default="hf://ablation", help="generator (default: %(default)s)")
    parser.add_argument("--vae", default=model.SD_VAE,
                        help="decoder of latents (default: %(default)s)")
    parser.add_argument("--cfg_scale", type=float, default=2.0,
                        help="guidance alpha (default: %(default)s, the best of ablation)")
    parser.add_argument("--out", default="real_weights.png",
                        help="grid to write (default: %(default)s)")
    args = parser.parse_args()

    began = time.time()
    generator = model.load_generator(args.ckpt)
    print(f"weights              {args.ckpt}: fetched and read in {time.time() - began:.0f} s")
    sizes = [p.numel() for p in generator.parameters()]
    tensors = len(sizes) - 1 + generator.noise_coords  # in the file each style table is one
    print(f"tensors in the file  {tensors} (ablation is known to have 241)")
    print(f"parameters           {sum(sizes):,} (ablation is known to have 132,708,880)")

    labels = np.array(list(CLASSES))
    latents = sample.generate(generator, labels, np.arange(len(labels)), args.cfg_scale)
    print(f"latents              {list(latents.shape)}, alpha {args.cfg_scale:g}, seed 0")
    print("of classes           " + ", ".join(f"{i} {name}" for i, name in CLASSES.items()))
    print(f"mean of latents      {latents.mean():.4f}, by channel {row(latents.mean((0, 2, 3)))}")
    print(f"std of latents       {latents.std():.4f}, by channel {row(latents.std((0, 2, 3)))} "
          "(of real images about 1)")

    vae = model.load_vae(args.vae)
    with torch.inference_mode():
        images = vae.decode(latents)
    outside = (images.abs() > 1).float().mean()
    print(f"images               {list(images.shape)}, {outside:.1%} of the values outside [-1, 1]")
    sample.save_grid(sample.to_uint8(images), 4, args.out)
    print(f"grid                 {args.out}: does it show the classes above, from left to right?")


def row(values):
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    model.run_script(main)
