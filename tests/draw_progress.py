"""Draws the energy distance and the loss of a run over its steps, as README's first page shows them.

    python tests/draw_progress.py runs/digits assets/progress.png
"""
import json
import math
import sys

from PIL import Image, ImageDraw, ImageFont

WIDTH = 560
HEIGHT = 240
LEFT = 56
RIGHT = 12
TOP = 26
BOTTOM = 30


def main(run, path):
    rows = {}
    for line in open(f"{run}/log.jsonl"):
        row = json.loads(line)
        if row.get("energy_distance") is not None:
            rows[row["step"]] = row  # of a step that was made twice, the last
    steps = sorted(rows)
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")  # halved at the end: smooth lines
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(24)

    def x_of(step):
        return 2 * (LEFT + (WIDTH - LEFT - RIGHT) * step / steps[-1])

    def y_of(value, low, high):
        place = (math.log10(value) - low) / (high - low)
        return 2 * (TOP + (HEIGHT - TOP - BOTTOM) * (1 - place))

    low, high = -2.3, 0.5  # powers of ten of the energy distance
    for power in (-2, -1, 0):
        y = y_of(10.0**power, low, high)
        draw.line((2 * LEFT, y, 2 * (WIDTH - RIGHT), y), "#dddddd", 2)
        draw.text((2 * LEFT - 8, y), f"{10.0**power:g}", "#555555", font, "rm")
    for step in range(0, steps[-1] + 1, 200):
        draw.text((x_of(step), 2 * (HEIGHT - BOTTOM) + 10), str(step), "#555555", font, "mt")

    first_loss = rows[steps[0]]["loss"]
    curves = {
        "energy distance between generated and real samples": (
            "#e66100", [max(rows[step]["energy_distance"], 1e-3) for step in steps]),
        "loss / its value at step 1": ("#5d3a9b", [rows[step]["loss"] / first_loss for step in steps]),
    }
    for i, (name, (colour, values)) in enumerate(curves.items()):
        points = [(x_of(step), y_of(value, low, high)) for step, value in zip(steps, values)]
        draw.line(points, colour, 5, "curve")
        draw.text((2 * LEFT + 10 + 640 * i, 8), name, colour, font)
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path)
    print(f"{path}: energy distance {rows[steps[0]]['energy_distance']:.3g} at step {steps[0]}, "
          f"{rows[steps[-1]]['energy_distance']:.3g} at step {steps[-1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
