"""Measures how cost grows, and draws it: tokens/s against batch, context length, number of experts and workers.

    python3 growth.py --moerun MOERUN --work DIR --out DIR [--layers N] [--repeat R] [--weights FORMAT]

MOERUN is the binary; checkpoints of the granite-3.1-1b-a400m shape go to --work, the plots (SVG) and the reports they are
drawn from (growth.json) to --out. Needs nothing but Python.
"""

import argparse
import json
import pathlib
import shutil
import subprocess

SHAPE = "granite-3.1-1b-a400m"
BATCHES = [1, 2, 4, 8, 16, 32]
CONTEXTS = [128, 512, 1024, 2048, 4096]
EXPERTS = [8, 16, 32, 64]
WORKERS = [0, 1, 2, 3, 4]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 360, 70, 62, 20, 50
COLOURS = ["#1f5fa8", "#b4501e"]


class Bench:
    """Runs `moerun bench` on checkpoints that are made when they are first wanted."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.made = {}

    def model(self, experts):
        """The directory of a checkpoint with so many experts a layer."""
        if experts not in self.made:
            directory = pathlib.Path(self.arguments.work) / f"growth-{experts}"
            shutil.rmtree(directory, ignore_errors=True)
            config = pathlib.Path(self.arguments.work) / f"growth-{experts}.json"
            plain = pathlib.Path(self.arguments.work) / "growth-config"
            if not plain.exists():
                self.call("synthesize", "--shape", SHAPE, "--layers", "1", "--out", plain)
            fields = json.loads((plain / "config.json").read_text())
            fields["num_hidden_layers"] = self.arguments.layers
            fields["num_local_experts"] = experts
            config.write_text(json.dumps(fields))
            self.call(
                "synthesize", "--config", config, "--out", directory, "--weights", self.arguments.weights
            )
            self.made[experts] = directory
        return self.made[experts]

    def run(self, experts=32, **flags):
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        report = self.call(
            "bench", "--model", self.model(experts), "--repeat", self.arguments.repeat, "--json", *words
        )
        return json.loads(report)

    def call(self, *words):
        command = [str(self.arguments.moerun), *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plot(title, shape, x_label, x_values, series):
    """One chart as SVG: tokens/s with the least and the largest as bars; `series` is (name, spreads) pairs."""
    highest = max(spread["max"] for _, spreads in series for spread in spreads)
    step = next(s for s in (10**e * f for e in range(-2, 7) for f in (1, 2, 5)) if highest / s <= 6)
    top_value = step * (int(highest / step) + 1)
    place_x = lambda i: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(x_values)
    place_y = lambda v: TOP + (HEIGHT - TOP - BOTTOM) * (1 - v / top_value)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
        f'<text x="{LEFT}" y="37" font-size="11" fill="#555555">{shape}</text>',
    ]
    value = 0.0
    while value <= top_value * 1.0001:
        y = place_y(value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        value += step
    for i, x in enumerate(x_values):
        out.append(f'<text x="{place_x(i):.1f}" y="{HEIGHT - 30}" text-anchor="middle">{x}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_label}</text>')
    out.append(f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">tokens/s</text>')
    for index, (name, spreads) in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(f'{place_x(i):.1f},{place_y(s["median"]):.1f}' for i, s in enumerate(spreads))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for i, s in enumerate(spreads):
            x = place_x(i)
            out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{place_y(s["min"]):.1f}" y2="{place_y(s["max"]):.1f}" stroke="{colour}"/>')
            out.append(f'<circle cx="{x:.1f}" cy="{place_y(s["median"]):.1f}" r="3" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT}" y="{37 + 14 * index}" text-anchor="end" fill="{colour}">{name}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def rate(report, index=0):
    """Tokens/s of one measurement of decode."""
    return report["decode"][index]["tokens_per_second"]


def prefill(report):
    """Tokens/s of prefill."""
    return report["prefill"]["tokens_per_second"]


def draw(shape, reports, out):
    """Writes all charts of `reports`."""
    batch, contexts, experts, workers = (reports[name] for name in ("batch", "context", "experts", "workers"))
    charts = {
        "batch": plot(
            "Decode against batch",
            shape,
            "sequences",
            BATCHES,
            [("all sequences together", [decode["tokens_per_second"] for decode in batch["decode"]])],
        ),
        "context": plot(
            "Against context length",
            shape,
            "tokens of the prompt",
            CONTEXTS,
            [("prefill", [prefill(report) for report in contexts]), ("decode", [rate(report) for report in contexts])],
        ),
        "experts": plot(
            "Decode against the number of experts, 8 chosen",
            shape,
            "experts a layer",
            EXPERTS,
            [("batch 16", [rate(report, 1) for report in experts]), ("batch 1", [rate(report) for report in experts])],
        ),
        "workers": plot(
            "Decode against worker processes on one machine",
            shape,
            "workers (0: experts in the gateway's process)",
            WORKERS,
            [("batch 16", [rate(report, 1) for report in workers]), ("batch 1", [rate(report) for report in workers])],
        ),
    }
    for name, svg in charts.items():
        (out / f"{name}.svg").write_text(svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moerun", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--weights", default="int8")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    shape = f"{SHAPE}, {arguments.layers} layers, {arguments.weights}"
    batch = bench.run(batch=",".join(map(str, BATCHES)), prompt_tokens=128, gen_tokens=32)
    contexts = [bench.run(prompt_tokens=tokens, gen_tokens=32) for tokens in CONTEXTS]
    experts = [bench.run(experts=count, batch="1,16", prompt_tokens=128, gen_tokens=32) for count in EXPERTS]
    workers = [bench.run(workers=count, batch="1,16", prompt_tokens=128, gen_tokens=32) for count in WORKERS]
    reports = {"batch": batch, "context": contexts, "experts": experts, "workers": workers}
    (out / "growth.json").write_text(json.dumps({"shape": shape, "reports": reports}, indent=1) + "\n")
    draw(shape, reports, out)
    for name, report in reports.items():
        print(name)
        for one in report if isinstance(report, list) else [report]:
            rates = [f"batch {d['batch']}: {d['tokens_per_second']['median']:.1f}" for d in one["decode"]]
            print(f"  prefill {prefill(one)['median']:.1f} tokens/s; decode {', '.join(rates)}")


if __name__ == "__main__":
    main()
