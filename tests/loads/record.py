#!/usr/bin/env python3
"""Records how often the bundled model chooses each expert, on text that it writes itself: Bible prose and definitions.

python3 tests/loads/record.py --moerun target/release/moerun
"""

import argparse
import json
import struct
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "models" / "tiny-bible-moe"
TOKENS = 200
BIBLE = [
    "In the beginning God",
    "And it came to pass in those days, that",
    "The LORD is my shepherd;",
    "And Moses said unto the people,",
    "Blessed are they that",
    "Now these are the names of",
    "My son, forget not",
    "And the angel said unto her,",
]
DEFINITIONS = ["a river", "a king", "a house", "an animal", "music", "a ship", "a law", "bread"]


def generate(moerun, prompt, seed, chat):
    """Token ids that the model writes after `prompt`."""
    command = [moerun, "generate", "--model", MODEL, "--prompt", prompt, "--seed", str(seed), "--temperature", "1"]
    command += ["--max-tokens", str(TOKENS), "--json"] + (["--chat"] if chat else ["--ignore-eos"])
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["token_ids"]


def write_ids(path, sequences):
    """input_ids and attention_mask as safetensors."""
    length = max(map(len, sequences))
    ids = [id for row in sequences for id in row + [0] * (length - len(row))]
    mask = [bit for row in sequences for bit in [1] * len(row) + [0] * (length - len(row))]
    size = 8 * len(ids)
    shape = [len(sequences), length]
    header = {
        "input_ids": {"dtype": "I64", "shape": shape, "data_offsets": [0, size]},
        "attention_mask": {"dtype": "I64", "shape": shape, "data_offsets": [size, 2 * size]},
    }
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack(f"<{2 * len(ids)}q", *ids, *mask))


def record(moerun, name, prompts, seeds, chat):
    sequences = [generate(moerun, prompt, seed, chat) for prompt in prompts for seed in range(seeds)]
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.safetensors"
        write_ids(inputs, sequences)
        out = HERE / f"{name}.json"
        command = [moerun, "forward", "--model", MODEL, "--inputs", inputs, "--out", Path(folder) / "logits.safetensors"]
        subprocess.run(command + ["--loads", out], check=True)
        lines = out.read_text().splitlines(keepends=True)
        tokens = sum(map(len, sequences))
        lines[2] = f'  "source": "tiny-bible-moe on {tokens} tokens of {name} that it wrote itself, temperature 1",\n'
        out.write_text("".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moerun", required=True)
    moerun = str(Path(parser.parse_args().moerun).resolve())
    record(moerun, "bible", BIBLE, seeds=4, chat=False)
    questions = [f"What is {thing}?" for thing in DEFINITIONS]
    record(moerun, "definitions", questions, seeds=16, chat=True)  # answers are short


if __name__ == "__main__":
    main()
