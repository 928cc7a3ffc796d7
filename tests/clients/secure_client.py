"""A client that knows an address, an authority and a key, and tries what should not work.

usage: secure_client.py ADDRESS CA_FILE GOLDEN_DIR GOOD_KEY BAD_KEY
"""

import json
import pathlib
import socket
import ssl
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from foreign_client import Service


def secure_channel(address, ca, key):
    credentials = grpc.ssl_channel_credentials(ca)
    if key is not None:
        token = grpc.access_token_call_credentials(key)
        credentials = grpc.composite_channel_credentials(credentials, token)
    return grpc.secure_channel(address, credentials)


def check_health(channel):
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING, health


def refused(call, code, reason=None):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}, wanted {code}: {error.details()}"
        if reason is not None:
            details = dict(error.trailing_metadata())["grpc-status-details-bin"]
            found = error_details_pb2.ErrorInfo()
            assert status_pb2.Status.FromString(details).details[0].Unpack(found), "no google.rpc.ErrorInfo"
            assert (found.reason, found.domain) == (reason, "moerun"), found
    else:
        raise AssertionError(f"no error, wanted {code}")


def generate(inference, golden):
    prompt, wanted = golden["prompts"][0], golden["greedy"][0]
    responses = inference.call(
        "Generate", token_ids={"ids": prompt}, max_tokens=len(wanted), ignore_eos=True, sampling={"temperature": 0.0}
    )
    ids = [token for response in responses for token in response.token_ids]
    assert ids == wanted, f"generated {ids}, wanted {wanted}"


def check_versions(address, ca_file):
    """TLS 1.2 is not spoken; 1.3 is, and only by those who know the authority."""
    host, port = address.rsplit(":", 1)

    def shake(context):
        with socket.create_connection((host, int(port)), timeout=10) as plain:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return secure.version()

    known = ssl.create_default_context(cafile=ca_file)
    assert shake(known) == "TLSv1.3"
    old = ssl.create_default_context(cafile=ca_file)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in [old, ssl.create_default_context()]:
        try:
            version = shake(context)
        except ssl.SSLError:
            continue
        raise AssertionError(f"no error, but {version}")


def main():
    address, ca_file, folder, good, bad = sys.argv[1:]
    golden = json.loads((pathlib.Path(folder) / "golden.json").read_text())
    ca = pathlib.Path(ca_file).read_bytes()
    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
    with secure_channel(address, ca, good) as channel:
        check_health(channel)
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        inference = Service(channel, pool, "moerun.v1.InferenceService")
        generate(inference, golden)
    for key, reason in [(None, "API_KEY_MISSING"), (bad, "API_KEY_UNKNOWN"), ("", "API_KEY_UNKNOWN")]:
        with secure_channel(address, ca, key) as channel:
            check_health(channel)  # told to everybody
            stranger = Service(channel, pool, "moerun.v1.InferenceService")
            refused(lambda: generate(stranger, golden), unauthenticated, reason)
            refused(lambda: stranger.call("Tokenize", text="x"), unauthenticated, reason)
            database = ProtoReflectionDescriptorDatabase(channel)
            refused(database.get_services, unauthenticated)
    with grpc.insecure_channel(address) as channel:
        refused(lambda: check_health(channel), grpc.StatusCode.UNAVAILABLE)
    check_versions(address, ca_file)
    print("keys, health and versions are as they should be")


if __name__ == "__main__":
    main()
