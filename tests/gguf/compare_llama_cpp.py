"""Compares Moerun with llama.cpp on the same GGUF files: logits and token ids.

    python3 compare_llama_cpp.py MOERUN WRITE_GGUF [FAMILY ...]

MOERUN is the binary, WRITE_GGUF the example of moerun-testkit. Needs PyPI llama-cpp-python, numpy and safetensors.
Both compute in f32, in different orders: logits differ by rounding. Prints a line per family; exit code 1 if one differs
by more than 1e-3 of the largest logit.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from llama_cpp import Llama
from safetensors.numpy import load_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "qwen3"]


def compare(moerun, write_gguf, family, folder):
    directory, path, out = GOLDEN / family, folder / f"{family}.gguf", folder / f"{family}.safetensors"
    subprocess.run([write_gguf, directory, path], check=True)
    inputs = directory / "golden.safetensors"
    subprocess.run([moerun, "forward", "--model", path, "--inputs", inputs, "--out", out, "--weights", "f32"], check=True)
    ours = load_file(out)["logits"]
    golden = load_file(inputs)
    model = Llama(str(path), n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=1)
    worst = 0.0
    for ids, mask, logits in zip(golden["input_ids"], golden["attention_mask"], ours):
        valid = mask.astype(bool)
        model.reset()
        model.eval([int(token) for token in ids[valid]])
        theirs = np.array(model.scores[: valid.sum()])
        worst = max(worst, float(np.abs(theirs - logits[valid]).max() / np.abs(theirs).max()))
    prompts = json.loads((directory / "golden.json").read_text())
    texts = prompts.get("texts", [])
    ids_equal = all(
        model.tokenize(text.encode(), add_bos=True, special=True) == ids
        for text, ids in zip(texts, prompts.get("prompts", []))
    )
    print(f"{family}: largest difference of logits {worst:.1e} of the largest; token ids of {len(texts)} texts "
          f"{'equal' if ids_equal else 'differ'}")
    return worst < 1e-3


def main():
    moerun, write_gguf, *families = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        fine = [compare(moerun, write_gguf, family, pathlib.Path(folder)) for family in families or FAMILIES]
    sys.exit(0 if all(fine) else 1)


main()
