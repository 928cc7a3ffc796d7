#!/usr/bin/env python3
"""Rows 8 and 9 of the fault matrix: lost and late packets between a gateway and its workers, each on a host of its own.

    rows.py MOERUN MODEL

Prints a line `row N: …` for each figure, `row N: SKIPPED, …` where this host lacks what it takes. Exits with 1 if a text
differs from that of one process with all experts, or a request fails.
"""

import json
import subprocess
import sys
import time

from links import Host, Lacking, Relay, missing_capability

LAYERS_TIMEOUT = 120
PROMPTS = ["1,2,3", "7,8", "4,5,6,7", "9"]
TOKENS = 48


def ready(process, name):
    line = process.stdout.readline()
    if not line.startswith("ready grpc="):
        raise RuntimeError(f"{name} is not ready: {process.stderr.read() if process.poll() is not None else line!r}")
    return line.strip().removeprefix("ready grpc=")


def ask(moerun, host, address, prompt):
    """Tokens of a greedy answer and the seconds it took."""
    command = [moerun, "generate", "--connect", address, "--prompt-ids", prompt, "--max-tokens", str(TOKENS)]
    command += ["--temperature", "0", "--ignore-eos", "--json"]
    begun = time.monotonic()
    process = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate(timeout=LAYERS_TIMEOUT)
    if process.returncode != 0:
        raise RuntimeError(f"a request failed: {error}")
    return json.loads(out)["token_ids"], time.monotonic() - begun


def cluster(moerun, model, delay, loss, seed):
    """Texts and tokens/s of two workers and a gateway over such links, and what the relay did."""
    hosts, processes, relay = [], [], None
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for index in range(1, 4):
            hosts.append(Host(index))
        relay = Relay(hosts, delay=delay, loss=loss, seed=seed)
        relay.start()
        workers = []
        for index, host in enumerate(hosts[1:]):
            command = [moerun, "worker", "--model", model, "--listen", f"{host.address}:50061"]
            command += ["--shard", f"{index}/2", "--log-level", "error", *insecure(moerun)]
            processes.append(host.popen(command, **pipes))
            workers += ["--worker", ready(processes[-1], f"worker {index}")]
        command = [moerun, "gateway", "--model", model, "--grpc-addr", "127.0.0.1:50051", *workers]
        processes.append(hosts[0].popen([*command, "--log-level", "error", *insecure(moerun)], **pipes))
        address = ready(processes[-1], "gateway")
        ask(moerun, hosts[0], address, PROMPTS[0])
        answers = [ask(moerun, hosts[0], address, prompt) for prompt in PROMPTS]
        rate = TOKENS * len(PROMPTS) / sum(took for _, took in answers)
        return [ids for ids, _ in answers], rate, relay.carried, relay.lost
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        if relay is not None and relay.is_alive():
            relay.close()
        for host in hosts:
            host.close()


def insecure(moerun):
    """The flag that allows plaintext beyond loopback, where the binary asks for it."""
    said = subprocess.run([moerun, "worker", "--help"], capture_output=True, text=True, check=True).stdout
    return ["--insecure"] if "--insecure" in said else []


def alone(moerun, model):
    """The texts of one process with all experts."""
    texts = []
    for prompt in PROMPTS:
        command = [moerun, "generate", "--model", model, "--prompt-ids", prompt, "--max-tokens", str(TOKENS)]
        command += ["--temperature", "0", "--ignore-eos", "--json"]
        texts.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["token_ids"])
    return texts


def main():
    moerun, model = sys.argv[1:]
    lacking = missing_capability()
    if lacking:
        for row in (8, 9):
            print(f"row {row}: SKIPPED, this host lacks {lacking}")
        return 0
    wanted = alone(moerun, model)
    layers = json.load(open(f"{model}/config.json"))["num_hidden_layers"]
    failed = 0

    def measure(row, name, delay, loss):
        nonlocal failed
        found, rate, carried, lost = cluster(moerun, model, delay, loss, seed=1)
        if loss and not lost:
            raise RuntimeError(f"row {row}: no packet was lost: nothing was tested")
        differing = sum(a != b for a, b in zip(found, wanted))
        failed += differing
        ideal = f", {rate * layers * 2 * delay * 100:.0f} % of the time is round trips" if delay else ""
        print(f"row {row}: {name}: {rate:.1f} tokens/s{ideal}; {differing} of {len(wanted)} texts differ; "
              f"{carried} packets carried, {lost} lost", flush=True)

    try:
        for loss in (0.0, 0.001, 0.01, 0.05):
            measure(8, f"loss {loss * 100:g} %", 0.0, loss)
        for delay in (0.001, 0.005, 0.01):
            measure(9, f"delay {delay * 1000:g} ms each way", delay, 0.0)
    except Lacking as lacking:
        print(f"row 8: SKIPPED, this host lacks {lacking}\nrow 9: SKIPPED, this host lacks {lacking}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
