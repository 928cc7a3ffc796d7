"""Compares Moerun with llama.cpp on the same GGUF files, in f32: logits of every position, and token ids.

    python3 compare_llama_cpp.py MOERUN WRITE_GGUF [CASE ...]

MOERUN is the binary, WRITE_GGUF the example of moerun-testkit. Needs the packages of requirements.txt. Each case is a
golden checkpoint, some with another config: rotary scaling follows from the config alone, and what a GGUF file cannot
say must be what llama.cpp takes for granted. Prints a line per case: the largest difference from llama.cpp and from the
checkpoint directory, over the largest logit. Exit code 1 if the former is above 1e-5, the latter above 0, or token ids
differ. With weights in 4 bits llama.cpp rounds activations to 8 bits, which can also change a choice of experts: there
the median over positions counts, and may be 2e-2.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

# llama.cpp rounds the ends of yarn's ramp, gpt-oss does not: with this theta both are at the last dimensions.
GPT_OSS = {"swiglu_limit": 7.0, "rope_parameters": YARN | {"rope_theta": 3.0, "truncate": False}}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
LLAMA4 = {"attention_chunk_size": 8192, "floor_scale": 8192}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

# Name, golden checkpoint, changes to its config.
CASES = [
    ("llama, llama3 rotary factors", "llama", {}),
    ("llama, linear rotary scaling", "llama", {"rope_parameters": LINEAR}),
    ("llama, yarn", "llama", {"rope_parameters": YARN}),
    ("mixtral", "mixtral", {}),
    ("mixtral, linear rotary scaling", "mixtral", {"rope_parameters": LINEAR}),
    ("qwen2moe", "qwen2_moe", {"num_hidden_layers": 1}),  # llama.cpp wants experts in every layer
    ("qwen2moe, yarn", "qwen2_moe", {"num_hidden_layers": 1, "rope_parameters": YARN}),
    ("qwen3moe", "qwen3_moe", {}),
    ("qwen3moe, yarn", "qwen3_moe", {"rope_parameters": YARN}),
    ("qwen3", "qwen3", {}),
    ("qwen3, yarn", "qwen3", {"rope_parameters": YARN}),
    ("qwen3, linear rotary scaling", "qwen3", {"rope_parameters": LINEAR}),
    ("olmoe", "olmoe", {}),
    ("granitemoe", "granitemoe", {}),
    ("gpt-oss", "gpt_oss", GPT_OSS),
    ("gpt-oss, MXFP4 experts", "gpt_oss", GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}),
    ("gpt-oss, no rotary scaling", "gpt_oss", GPT_OSS | {"rope_parameters": PLAIN}),
    ("deepseek2 of V2", "deepseek_v2", GREEDY),
    ("deepseek2 of V2, no rotary scaling", "deepseek_v2", GREEDY | {"rope_parameters": PLAIN}),
    ("deepseek2 of V3", "deepseek_v3", {}),
    ("glm4moe", "glm4_moe", {}),
    ("ernie4_5-moe", "ernie4_5_moe", {}),
    ("llama4", "llama4_text", LLAMA4),
    ("llama4, llama3 rotary factors", "llama4_text", LLAMA4 | {"rope_parameters": LLAMA3}),
    ("llama4, 128 experts", "llama4_text", LLAMA4 | {"num_local_experts": 128, "use_qk_norm": False}),
    ("llama4, beyond a chunk", "llama4_text", LLAMA4 | {"max_position_embeddings": 16384}),
]


def checkpoint(family, changes, folder):
    """A copy of a golden checkpoint with another config."""
    directory = folder / "checkpoint"
    shutil.copytree(GOLDEN / family, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    if "num_hidden_layers" in changes:
        config = {name: value for name, value in config.items() if name not in ("layer_types", "mlp_only_layers")}
        weights = load_file(directory / "model.safetensors")
        dropped = tuple(f"model.layers.{layer}." for layer in range(changes["num_hidden_layers"], 64))
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(dropped)}
        save_file(kept, directory / "model.safetensors")
    if "num_local_experts" in changes:
        weights = load_file(directory / "model.safetensors")
        random = np.random.default_rng(4)
        for name in [name for name in weights if ".experts." in name or ".router." in name]:
            shape = (changes["num_local_experts"], *weights[name].shape[1:])
            weights[name] = random.normal(0, weights[name].std(), shape).astype(np.float32)
        save_file(weights, directory / "model.safetensors")
    if "quantization_config" in changes:
        weights = load_file(directory / "model.safetensors")
        random = np.random.default_rng(3)
        for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = weights.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            weights[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), dtype=np.uint8)
            weights[f"{name}_scales"] = random.integers(122, 125, shape, dtype=np.uint8)
        save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def forward(moerun, model, inputs, out):
    command = [moerun, "forward", "--model", model, "--inputs", inputs, "--out", out, "--weights", "f32"]
    subprocess.run(command, check=True)
    return load_file(out)["logits"]


def compare(moerun, write_gguf, name, family, changes, folder):
    directory, path = checkpoint(family, changes, folder), folder / "model.gguf"
    subprocess.run([write_gguf, directory, path], check=True)
    inputs = directory / "golden.safetensors"
    if "max_position_embeddings" in changes:
        ids = np.random.default_rng(5).integers(3, 300, (1, 8400), dtype=np.int64)
        save_file({"input_ids": ids, "attention_mask": np.ones_like(ids)}, inputs)
    ours = forward(moerun, path, inputs, folder / "gguf.safetensors")
    from_directory = forward(moerun, directory, inputs, folder / "directory.safetensors")
    golden = load_file(inputs)
    # The cache is f16 by default, which alone would move logits by 1e-3.
    model = Llama(str(path), n_ctx=golden["input_ids"].shape[1] + 64, n_batch=256, logits_all=True, verbose=False, n_threads=1,
                  type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False)
    largest = drift = 0.0
    differences = []
    for ids, mask, logits, wanted in zip(golden["input_ids"], golden["attention_mask"], ours, from_directory):
        valid = mask.astype(bool)
        model.reset()
        model.eval([int(token) for token in ids[valid]])
        theirs = np.array(model.scores[: valid.sum()])
        largest = max(largest, float(np.abs(theirs).max()))
        differences.extend(np.abs(theirs - logits[valid]).max(axis=1))
        drift = max(drift, float(np.abs(wanted[valid] - logits[valid]).max()))
    facts = json.loads((directory / "golden.json").read_text())
    texts, prompts = facts["texts"], facts["prompts"]
    # The golden prompts begin with a token that the tokenizer does not add itself.
    same_ids = all(
        model.tokenize(text.encode(), add_bos=False, special=True) == ids[1:] for text, ids in zip(texts, prompts)
    )
    in_blocks = "quantization_config" in changes
    difference = float(np.median(differences) if in_blocks else np.max(differences)) / largest
    print(f"{name}: llama.cpp {difference:.1e}{' (median)' if in_blocks else ''}, directory {drift / largest:.1e}, "
          f"token ids of {len(texts)} texts {'equal' if same_ids else 'DIFFERENT'}", flush=True)
    return difference <= (2e-2 if in_blocks else 1e-5) and drift == 0 and same_ids


def main():
    moerun, write_gguf, *names = sys.argv[1:]
    fine = True
    for case in CASES:
        if names and not any(name in case[0] for name in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                fine &= compare(moerun, write_gguf, *case, pathlib.Path(folder))
            except (subprocess.CalledProcessError, ValueError) as error:
                print(f"{case[0]}: {error}", flush=True)
                fine = False
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
