"""Writes a checkpoint directory of the families granitemoe and olmoe as a GGUF file.

    python3 to_gguf.py DIR FILE bf16|q8_0|q4_0

Matrices get the format asked for; norms and routers stay f32, as llama.cpp's own converter leaves them, and with q4_0 the
embedding and the head are q8_0, as in Moerun's int4. Needs PyPI gguf and numpy. Tensors pass one at a time, so a model may
be larger than memory.
"""

import json
import mmap
import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

FORMATS = {"bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
ARCHITECTURES = {"granitemoe": "granitemoe", "olmoe": "olmoe"}
# Rows that are converted at one time.
CHUNK_ROWS = 4096


class Weights:
    """The tensors of all safetensors files of a directory, as f32 when asked for."""

    def __init__(self, directory):
        self.tensors = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = path.open("rb")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(data[:8], "little")
            for name, entry in json.loads(data[8 : 8 + length]).items():
                if name != "__metadata__":
                    self.tensors[name] = (data, 8 + length + entry["data_offsets"][0], entry["dtype"], entry["shape"])

    def shape(self, name):
        return self.tensors[name][3]

    def read(self, name):
        data, offset, dtype, shape = self.tensors[name]
        count = int(np.prod(shape))
        if dtype == "BF16":
            halves = np.frombuffer(data, np.uint16, count, offset)
            values = (halves.astype(np.uint32) << 16).view(np.float32)
        elif dtype in ("F32", "F16"):
            values = np.frombuffer(data, np.float32 if dtype == "F32" else np.float16, count, offset).astype(np.float32)
        else:
            sys.exit(f"{name}: wanted F32, F16 or BF16, found {dtype}")
        return values.reshape(shape)


def interleaved(matrix, heads):
    """Rows [heads, 2, head / 2] become [heads, head / 2, 2]: llama.cpp rotates neighbours."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors_of(config, weights):
    """(name, shape, whether it takes the format, function that reads it), in the order of the file."""
    family = config["model_type"]
    yield "token_embd.weight", weights.shape("model.embed_tokens.weight"), True, lambda: weights.read("model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}.", f"blk.{layer}."

        def plain(name, to, matrix=True, heads=None, source=source, target=target):
            def read():
                values = weights.read(source + name)
                return interleaved(values, heads) if heads else values

            return target + to, weights.shape(source + name), matrix, read

        turned = family == "granitemoe"
        yield plain("input_layernorm.weight", "attn_norm.weight", False)
        yield plain("self_attn.q_proj.weight", "attn_q.weight", heads=config["num_attention_heads"] if turned else None)
        yield plain("self_attn.k_proj.weight", "attn_k.weight", heads=config["num_key_value_heads"] if turned else None)
        yield plain("self_attn.v_proj.weight", "attn_v.weight")
        yield plain("self_attn.o_proj.weight", "attn_output.weight")
        if family == "olmoe":
            yield plain("self_attn.q_norm.weight", "attn_q_norm.weight", False)
            yield plain("self_attn.k_norm.weight", "attn_k_norm.weight", False)
        yield plain("post_attention_layernorm.weight", "ffn_norm.weight", False)
        if family == "granitemoe":
            yield plain("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight", False)
            both = source + "block_sparse_moe.input_linear.weight"
            experts, rows, columns = weights.shape(both)
            shape = [experts, rows // 2, columns]
            yield target + "ffn_gate_exps.weight", shape, True, lambda both=both, half=rows // 2: weights.read(both)[:, :half]
            yield target + "ffn_up_exps.weight", shape, True, lambda both=both, half=rows // 2: weights.read(both)[:, half:]
            yield plain("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight")
        else:
            yield plain("mlp.gate.weight", "ffn_gate_inp.weight", False)
            for kind in ("gate", "up", "down"):
                names = [f"{source}mlp.experts.{expert}.{kind}_proj.weight" for expert in range(config["num_experts"])]
                shape = [len(names), *weights.shape(names[0])]
                yield f"{target}ffn_{kind}_exps.weight", shape, True, lambda names=names: np.stack([weights.read(name) for name in names])
    yield "output_norm.weight", weights.shape("model.norm.weight"), False, lambda: weights.read("model.norm.weight")
    if not config.get("tie_word_embeddings"):
        yield "output.weight", weights.shape("lm_head.weight"), True, lambda: weights.read("lm_head.weight")


def type_of(name, takes_format, wanted):
    if not takes_format:
        return Type.F32
    if wanted == Type.Q4_0 and name in ("token_embd.weight", "output.weight"):
        return Type.Q8_0
    return wanted


def encoded(values, kind):
    rows = values.reshape(-1, values.shape[-1])
    chunks = [gguf.quants.quantize(rows[first : first + CHUNK_ROWS], kind) for first in range(0, len(rows), CHUNK_ROWS)]
    joined = np.concatenate(chunks)
    return joined.reshape(*values.shape[:-1], joined.shape[-1])


def add_metadata(writer, config):
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def add_tokenizer(writer, directory, config):
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokens = [f"[PAD{token}]" for token in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    # An empty list has no type, and llama.cpp wants one: a merge that can never happen.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    writer.add_add_bos_token(False)
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])


def convert(directory, path, wanted):
    directory, path = pathlib.Path(directory), pathlib.Path(path)
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        sys.exit(f"{directory}: wanted one of {', '.join(ARCHITECTURES)}, found {config['model_type']}")
    weights = Weights(directory)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    add_metadata(writer, config)
    add_tokenizer(writer, directory, config)
    tensors = list(tensors_of(config, weights))
    for name, shape, takes_format, _ in tensors:
        kind = type_of(name, takes_format, wanted)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape))
        stored = [*shape[:-1], shape[-1] // block * size] if kind != Type.F32 else shape
        writer.add_tensor_info(name, stored, np.dtype(np.uint8 if kind != Type.F32 else np.float32), count // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, takes_format, read in tensors:
        kind = type_of(name, takes_format, wanted)
        values = np.ascontiguousarray(read())
        writer.write_tensor_data(values if kind == Type.F32 else encoded(values, kind))
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in FORMATS:
        sys.exit(__doc__)
    convert(sys.argv[1], sys.argv[2], FORMATS[sys.argv[3]])
