"""Builds the images, starts the Compose cluster, and breaks its containers while it answers: the text stays the same.

usage: compose_cluster.py        (needs root, a Docker engine, docker-compose and debootstrap)

Where there is no Docker engine it says SKIPPED and ends well.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "deploy/docker/compose.yaml"
PROJECT = "moerun-test"
IMAGE = "moerun:test"
BASES = {"build": "moerun-build-base:bookworm", "runtime": "moerun-runtime-base:bookworm"}
PROMPT = "And it came to pass in those days, that"
TOKENS = 160
# Until a pod of containers answers on a busy machine.
START_SECONDS = 120
# A generation takes a second or two; with a worker that hangs, a few more.
ANSWER_SECONDS = 120


def sh(*command: str, timeout: float = 120, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


ENVIRONMENT = dict(
    os.environ,
    MOERUN_IMAGE=IMAGE,
    GRPC_PORT="0",
    MODEL=str(ROOT / "tests/models/tiny-bible-moe"),
)


def compose(*arguments: str, timeout: float = 120, check: bool = True) -> str:
    return sh("docker-compose", "-p", PROJECT, "-f", str(COMPOSE), *arguments, timeout=timeout, check=check)


def build() -> None:
    for name, image in BASES.items():
        if not sh("docker", "images", "-q", image).strip():
            sh(str(ROOT / "deploy/docker/make-base-images.sh"), name, timeout=900)
    sh(
        "docker", "build", "-q", "-f", str(ROOT / "deploy/docker/Dockerfile"), "-t", IMAGE,
        "--build-arg", f"BUILD_IMAGE={BASES['build']}", "--build-arg", f"RUNTIME_IMAGE={BASES['runtime']}",
        "--build-arg", "PROFILE=release", str(ROOT),
        timeout=2400,
    )


def container(service: str) -> str:
    return compose("ps", "-q", service).strip()


def wait_until(what: str, done, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


def is_healthy(service: str) -> bool:
    return sh("docker", "inspect", "-f", "{{.State.Health.Status}}", container(service)).strip() == "healthy"


def gateway_log() -> str:
    done = subprocess.run(["docker", "logs", container("gateway")], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def ask() -> list[int]:
    answer = compose(
        "exec", "-T", "gateway", "moerun", "generate", "--connect", "127.0.0.1:50051", "--prompt", PROMPT,
        "--max-tokens", str(TOKENS), "--temperature", "0", "--ignore-eos", "--json", timeout=ANSWER_SECONDS,
    )
    return json.loads(answer)["token_ids"]


def ask_while(fault) -> list[list[int]]:
    """Answers of four clients that keep asking while `fault` happens and for a little after it; each must come."""
    answers, failures, over = [], [], threading.Event()

    def client() -> None:
        try:
            while not over.is_set():
                answers.append(ask())
        except Exception as error:  # of any kind: the main thread reports it
            failures.append(error)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for it in clients:
        it.start()
    try:
        wait_until("a first answer", lambda: answers or failures, ANSWER_SECONDS)
        fault()
        time.sleep(3)
    finally:
        over.set()
        for it in clients:
            it.join()
    if failures:
        raise failures[0]
    return answers


def test_containers_are_confined():
    for service in ("gateway", "worker-0"):
        facts = json.loads(sh("docker", "inspect", container(service)))[0]
        assert facts["HostConfig"]["ReadonlyRootfs"] and facts["HostConfig"]["CapDrop"] == ["ALL"], service
        assert facts["Config"]["User"] == "65532:65532", service
        written = subprocess.run(["docker", "exec", container(service), "touch", "/new"], capture_output=True)
        assert written.returncode != 0, f"{service} can write its root"


def broken(fault, mend, sign: str):
    """Breaks worker-1 under load; the answers stay what they were, and the gateway's log tells of it."""
    wanted = ask()
    before = gateway_log().count(sign)
    answers = ask_while(lambda: fault(container("worker-1")))
    assert len(answers) >= 4 and all(it == wanted for it in answers), "an answer differs"
    wait_until(f"the log tells {sign!r}", lambda: gateway_log().count(sign) > before, 10)
    back = gateway_log().count("worker is connected")
    mend(container("worker-1"))
    wait_until("the worker is back", lambda: gateway_log().count("worker is connected") > back)
    assert ask() == wanted


def test_a_killed_container_loses_nothing():
    broken(lambda it: sh("docker", "kill", it), lambda it: sh("docker", "start", it), "worker is gone")


def test_a_paused_container_loses_nothing():
    broken(lambda it: sh("docker", "pause", it), lambda it: sh("docker", "unpause", it), "worker is gone")


def test_a_disconnected_container_loses_nothing():
    network = f"{PROJECT}_cluster"
    broken(
        lambda it: sh("docker", "network", "disconnect", network, it),
        lambda it: sh("docker", "network", "connect", "--alias", "worker-1", network, it),
        "worker is gone",
    )


def test_workers_are_restarted_one_by_one_without_a_failure():
    wanted = ask()

    def restart_all() -> None:
        for service in ("worker-0", "worker-1", "worker-2", "worker-3"):
            back = gateway_log().count("worker is connected")
            sh("docker", "restart", "-t", "40", container(service))
            wait_until(f"{service} is back", lambda: gateway_log().count("worker is connected") > back)

    assert all(it == wanted for it in ask_while(restart_all))


def main() -> int:
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        print("compose cluster: SKIPPED, no Docker engine")
        return 0
    begun = time.monotonic()
    build()
    print(f"images built in {time.monotonic() - begun:.0f} s")
    tests = [(name, it) for name, it in globals().items() if name.startswith("test_")]
    failed = 0
    try:
        compose("up", "-d", timeout=300)
        for service in ("gateway", "worker-0", "worker-1", "worker-2", "worker-3"):
            wait_until(f"{service} is healthy", lambda: is_healthy(service))
        for name, test in tests:
            try:
                test()
                print(f"{name} ... ok", flush=True)
            except Exception as error:
                failed += 1
                print(f"{name} ... FAILED: {error}", flush=True)
        if failed:
            print(compose("logs", "--tail", "40", check=False))
    finally:
        compose("down", "-v", "-t", "5", check=False)
    print(f"{len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
