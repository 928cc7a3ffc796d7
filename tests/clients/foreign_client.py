"""A client that knows nothing of Moerun but an address: it learns the services by reflection.

usage: foreign_client.py ADDRESS GOLDEN_DIR

Checks against golden data: greedy generation, and every MoE layer run by itself. Ends with exit code 0 if all holds.
"""

import array
import json
import pathlib
import struct
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Service:
    """Calls the methods of one service, their messages taken from reflection."""

    def __init__(self, channel, pool, name):
        self.channel = channel
        self.descriptor = pool.FindServiceByName(name)

    def call(self, method, **fields):
        descriptor = self.descriptor.methods_by_name[method]
        request = GetMessageClass(descriptor.input_type)(**fields)
        response = GetMessageClass(descriptor.output_type)
        start = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        rpc = start(
            f"/{self.descriptor.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return rpc(request, timeout=60)


def read_safetensors(path):
    """Names to (shape, values) of a safetensors file, standard library only."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    codes = {"F32": "f", "I64": "q", "U8": "B"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = entry["shape"], array.array(codes[entry["dtype"]], data[first:end])
    return tensors


def check_generate(inference, golden):
    for prompt, wanted in zip(golden["prompts"], golden["greedy"]):
        responses = list(
            inference.call(
                "Generate",
                token_ids={"ids": prompt},
                max_tokens=len(wanted),
                ignore_eos=True,
                sampling={"temperature": 0.0},
            )
        )
        ids = [token for response in responses for token in response.token_ids]
        assert ids == wanted, f"generated {ids}, wanted {wanted}"
        usage = responses[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(wanted)), usage
    print(f"generated {len(golden['prompts'])} golden continuations")


def check_layers(layers, golden, tensors):
    _, mask = tensors["attention_mask"]
    for j, layer in enumerate(golden["moe_layers"]):
        (batch, sequence, hidden), rows = tensors[f"moe.{j}.input"]
        _, wanted = tensors[f"moe.{j}.output"]
        response = layers.call("RunLayer", layer=layer, rows=batch * sequence, hidden_states=rows.tobytes())
        found = array.array("f", response.hidden_states)
        assert len(found) == len(wanted), f"layer {layer}: {len(found)} values, wanted {len(wanted)}"
        for index, (a, b) in enumerate(zip(found, wanted)):
            if mask[index // hidden]:
                assert abs(a - b) <= 1e-4 + 1e-4 * abs(b), f"layer {layer}, value {index}: {a}, wanted {b}"
    print(f"ran {len(golden['moe_layers'])} MoE layers")


def check_errors(inference, layers):
    for call, wanted in [
        (lambda: list(inference.call("Generate", text="x", model="no such model")), grpc.StatusCode.NOT_FOUND),
        (lambda: list(inference.call("Generate", token_ids={"ids": []})), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: layers.call("RunLayer", layer=999, rows=1, hidden_states=b"1234"), grpc.StatusCode.INVALID_ARGUMENT),
    ]:
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() == wanted, f"{error.code()}, wanted {wanted}: {error.details()}"
            details = dict(error.trailing_metadata()).get("grpc-status-details-bin")
            assert details, f"no google.rpc details with {error.details()}"
        else:
            raise AssertionError(f"no error, wanted {wanted}")
    print("errors come with codes and details")


def main():
    address, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    golden = json.loads((folder / "golden.json").read_text())
    tensors = read_safetensors(folder / "golden.safetensors")
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING, health
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"moerun.v1.InferenceService", "moerun.v1.MoeLayerService"} <= services, services
        pool = DescriptorPool(database)
        inference = Service(channel, pool, "moerun.v1.InferenceService")
        layers = Service(channel, pool, "moerun.v1.MoeLayerService")
        check_generate(inference, golden)
        if golden["moe_layers"]:
            check_layers(layers, golden, tensors)
        check_errors(inference, layers)


if __name__ == "__main__":
    main()
