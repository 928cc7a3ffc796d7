"""Runs Moerun and llama.cpp alternately on the same weights and the same token ids, and prints ratios.

    python3 compare_llama_cpp.py --moerun MOERUN --shape NAME --work DIR [--formats bf16,q8_0,q4_0] [--batches 1,16]
        [--prompt-tokens 512] [--gen-tokens 64] [--pairs 7] [--threads N] [--layers N] [--keep]

MOERUN is the binary; NAME a shape of `moerun synthesize` of the families granitemoe and olmoe; DIR takes the files. Needs PyPI
llama-cpp-python built for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python
llama-cpp-python), gguf, numpy and safetensors.

Every run is a process of its own, and each pair has three: llama.cpp as it comes, llama.cpp without memory mapping and with
huge pages, Moerun. The better of the two counts. A ratio is a quotient of medians; beside it stands the largest that the
machine allows, by the bytes (decode) or operations (prefill) of a token and the machine's limit, which Moerun measured in its
own runs. Before that the logits of both are compared. Exit code 1 if they are not alike.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
# What llama.cpp's formats are called here.
WEIGHTS = {"bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}
MASK = (1 << 64) - 1
LIKENESS_TOKENS = 24
# Median cosine of the logits of a position, at least. llama.cpp rounds activations to 8 bits beside quantised weights.
ALIKE = {"bf16": 0.999, "q8_0": 0.99, "q4_0": 0.98}


def prompt(index, tokens, vocabulary, seed=0):
    """The token ids that `moerun bench --seed SEED` draws for prompt `index` (splitmix64)."""
    state, ids = seed ^ (index * 0x9E3779B97F4A7C15 & MASK), []
    for _ in range(tokens):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        mixed = state
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        ids.append(((mixed ^ mixed >> 31) >> 32) * vocabulary >> 32)
    return ids


class Llama:
    """A model of llama.cpp, driven by its C interface so that nothing but its own work is timed."""

    def __init__(self, path, threads, sequences, context, use_mmap):
        import llama_cpp

        self.c = llama_cpp
        # Its messages would be taken for results.
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_mmap = use_mmap
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            sys.exit(f"{path}: llama.cpp does not load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"{path}: llama.cpp makes no context of {params.n_ctx} tokens")
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, rows):
        """Rows of (token, position, sequence, whether logits are wanted), at most 512."""
        self.batch.n_tokens = len(rows)
        for index, (token, position, sequence, logits) in enumerate(rows):
            self.batch.token[index] = token
            self.batch.pos[index] = position
            self.batch.n_seq_id[index] = 1
            self.batch.seq_id[index][0] = sequence
            self.batch.logits[index] = logits
        if self.c.llama_decode(self.context, self.batch) != 0:
            sys.exit("llama.cpp could not decode")
        self.c.llama_synchronize(self.context)

    def prefill(self, ids, sequence):
        for first in range(0, len(ids), 512):
            chunk = ids[first : first + 512]
            last = len(ids) - 1
            self.decode([(token, first + at, sequence, first + at == last) for at, token in enumerate(chunk)])

    def clear(self):
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def logits(self, row):
        pointer = self.c.llama_get_logits_ith(self.context, row)
        return [pointer[index] for index in range(self.vocabulary)]


def llama_child(task):
    """One run of llama.cpp: prints tokens per second of prefill and of decode for each batch size."""
    prompt_tokens, gen_tokens, batches = task["prompt_tokens"], task["gen_tokens"], task["batches"]
    context = prompt_tokens + gen_tokens + 16
    llama = Llama(task["path"], task["threads"], max(batches), context, task["use_mmap"])
    if task.get("likeness"):
        ids = prompt(0, LIKENESS_TOKENS, llama.vocabulary)
        llama.decode([(token, at, 0, True) for at, token in enumerate(ids)])
        print(json.dumps({"ids": ids, "logits": [llama.logits(row) for row in range(len(ids))]}))
        return
    llama.prefill(prompt(0, prompt_tokens, llama.vocabulary), 0)  # not counted
    llama.clear()
    begun = time.perf_counter()
    llama.prefill(prompt(1, prompt_tokens, llama.vocabulary), 0)
    result = {"prefill": prompt_tokens / (time.perf_counter() - begun), "decode": {}}
    for batch in batches:
        llama.clear()
        for sequence in range(batch):
            llama.prefill(prompt(batch + sequence, prompt_tokens, llama.vocabulary), sequence)
        # What follows is drawn too: to choose it from the logits would be timed in one and not in the other.
        drawn = [prompt(10_000 + sequence, gen_tokens + 2, llama.vocabulary) for sequence in range(batch)]
        step = lambda at: llama.decode([(drawn[s][at], prompt_tokens + at, s, True) for s in range(batch)])
        step(0)
        step(1)
        begun = time.perf_counter()
        for at in range(2, gen_tokens + 2):
            step(at)
        result["decode"][str(batch)] = batch * gen_tokens / (time.perf_counter() - begun)
    print(json.dumps(result))


def run_llama(task, variables=None):
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        env=os.environ | (variables or {}),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def run_moerun(options, path, weights):
    command = [options.moerun, "bench", "--model", path, "--weights", weights, "--threads", str(options.threads)]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--gen-tokens", str(options.gen_tokens)]
    command += ["--batch", options.batches, "--repeat", "1", "--json", "--log-level", "warn"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def likeness(options, path, weights):
    """Median cosine of the logits of a position, and the largest difference over the largest logit."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    task = {"path": str(path), "threads": options.threads, "use_mmap": True, "likeness": True}
    theirs = run_llama(task | {"prompt_tokens": LIKENESS_TOKENS, "gen_tokens": 1, "batches": [1]})
    inputs, out = path.with_suffix(".in"), path.with_suffix(".out")
    save_file({"input_ids": np.array([theirs["ids"]], dtype=np.int64)}, inputs)
    command = [options.moerun, "forward", "--model", path, "--weights", weights, "--inputs", inputs, "--out", out]
    subprocess.run([*command, "--log-level", "warn"], check=True)
    ours, theirs = load_file(out)["logits"][0].astype(np.float64), np.array(theirs["logits"])
    inputs.unlink()
    out.unlink()
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return float(np.median(cosines)), float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def takes(options, path, weights):
    """Whether this build of Moerun knows the format; what else goes wrong is an error later."""
    help_text = subprocess.run([options.moerun, "bench", "kernels", "--weights", weights, "--rows", "0"], capture_output=True, text=True)
    return "unknown number format" not in help_text.stderr


def spread(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def compare(options, format_name, directory):
    path = options.work / f"{directory.name}-{format_name}.gguf"
    weights = WEIGHTS[format_name]
    if not takes(options, path, weights):
        print(f"{format_name}: left out, this Moerun has no {weights}")
        return True
    if not path.exists():
        subprocess.run([sys.executable, HERE / "to_gguf.py", directory, path, format_name], check=True)
    cosine, worst = likeness(options, path, weights)
    alike = cosine >= ALIKE[format_name]
    print(f"{format_name}: logits' median cosine {cosine:.6f}, largest difference {worst:.1e} of the largest: {'alike' if alike else 'NOT ALIKE'}")
    batches = [int(batch) for batch in options.batches.split(",")]
    task = {
        "path": str(path),
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "gen_tokens": options.gen_tokens,
        "batches": batches,
    }
    variants = {
        "default": lambda: run_llama(task | {"use_mmap": True}),
        "no mmap, huge pages": lambda: run_llama(task | {"use_mmap": False}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    }
    llama = {name: [] for name in variants}
    moerun = []
    for _ in range(options.pairs):
        for name, run in variants.items():
            llama[name].append(run())
        moerun.append(run_moerun(options, path, weights))

    peaks = [run["machine"]["multiply_ops_per_second"] for run in moerun]
    # What prefill is bound by: the instruction for the format, or f32's where there is none.
    instruction = "bf16" if format_name == "bf16" else "int8"
    peak = max(run.get(instruction) or run["f32"] for run in peaks)
    rows = [("prefill", [run["prefill"]["tokens_per_second"]["median"] for run in moerun],
             peak * options.prompt_tokens / moerun[0]["prefill"]["ops"], lambda run: run["prefill"])]
    for index, batch in enumerate(batches):
        rates = [run["decode"][index]["tokens_per_second"]["median"] for run in moerun]
        # By the read bandwidth that each run found before and after it.
        bounds = [rate / run["decode"][index]["fraction_of_read_bandwidth"] for rate, run in zip(rates, moerun)]
        rows.append((f"decode, batch {batch}", rates, statistics.median(bounds), lambda run, batch=batch: run["decode"][str(batch)]))
    for name, rates, bound, of in rows:
        best = max(llama, key=lambda variant: statistics.median(of(run) for run in llama[variant]))
        theirs = [of(run) for run in llama[best]]
        middle = statistics.median(theirs)
        print(
            f"{format_name} {name}: Moerun {spread(rates)}, llama.cpp ({best}) {spread(theirs)} tokens/s; "
            f"ratio {statistics.median(rates) / middle:.2f}, at most {bound / middle:.2f}"
        )
    if not options.keep:
        path.unlink()
    return alike


def main():
    if sys.argv[1:2] == ["--child"]:
        llama_child(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moerun", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--formats", default="bf16,q8_0,q4_0")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--keep", action="store_true", help="keep the GGUF files")
    options = parser.parse_args()

    import llama_cpp

    options.work.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([options.moerun, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{version}; llama-cpp-python {llama_cpp.__version__}: {llama_cpp.llama_print_system_info().decode()}")
    layers = [] if options.layers is None else ["--layers", str(options.layers)]
    directory = options.work / "-".join([options.shape, *map(str, layers[1:])])
    if not directory.exists():
        command = [options.moerun, "synthesize", "--shape", options.shape, "--out", directory, *layers]
        subprocess.run(command, check=True)
    alike = [compare(options, name, directory) for name in options.formats.split(",")]
    sys.exit(0 if all(alike) else 1)


main()
