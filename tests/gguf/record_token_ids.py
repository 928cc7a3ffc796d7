"""Records what llama.cpp makes of texts under each pre-tokenizer: `record_token_ids.py OUT.json`.

The vocabulary is trained on the texts as a whole, so that its merges cross every boundary that a pre-tokenizer may set:
each boundary then shows in the ids. The Rust tests read the file (crates/moerun-gateway/src/text/gguf/token_ids.json).
Needs the packages of requirements.txt.
"""

import collections
import json
import pathlib
import sys
import tempfile

from gguf import GGUFWriter, TokenType
from llama_cpp import Llama

NAMES = ["gpt-2", "olmo", "refact", "smollm", "llama-bpe", "qwen2", "gpt-4o", "deepseek-llm", "deepseek-v3", "glm4",
         "chatglm-bpe"]
TEXTS = [
    "In the beginning God created the heaven and the earth. And God said, Let there be light!",
    "it's 1234567 o'clock; WE'LL pay 3.14159 dollars (or 27%) by 2024-11-24, they've said",
    " two  spaces\nand lines\r\n\r\n\n   indented\tand\ttabs   \n  end  ",
    "fn main() { let x_y = a[i]->b::c(); // comment\n\treturn x != 0 && y <= 10; }",
    "camelCase HTTPServer iPhone XMLHttpRequest2 snake_case_name CONSTANT_NAME",
    "天地玄黄宇宙洪荒123こんにちは世界カタカナ、日月盈昃。",
    "Привет, мир! γειά σου Κόσμε straße naïve déjà",
    "https://example.org/path?q=1&r=two#frag user@example.com ---- ==== !!! ???",
]
MERGES = 900


def alphabet():
    """The letters that GPT-2 writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def train(texts, letters):
    words = [[letters[byte] for byte in text.encode()] for text in texts]
    tokens, merges = [letters[byte] for byte in range(256)], []
    known = set(tokens)
    while len(merges) < MERGES:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = max(counts, key=lambda pair: (counts[pair], pair), default=None)
        if pair is None:
            break
        whole = "".join(pair)
        merges.append(" ".join(pair))
        if whole not in known:
            known.add(whole)
            tokens.append(whole)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = [whole]
                at += 1
    return tokens, merges


def token_ids(name, tokens, merges, folder):
    path = folder / "vocabulary.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]


def main():
    tokens, merges = train(TEXTS, alphabet())
    with tempfile.TemporaryDirectory() as folder:
        ids = {name: token_ids(name, tokens, merges, pathlib.Path(folder)) for name in NAMES}
    recorded = {"texts": TEXTS, "tokens": tokens, "merges": merges, "ids": ids}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(recorded, ensure_ascii=False, separators=(",", ":")) + "\n")


main()
