"""The generated gRPC code is that of the .proto beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from etcdreplica.checkpoint import exchange_pb2, exchange_pb2_grpc
from etcdreplica.daemon import peer_pb2, peer_pb2_grpc
from tests.generate_proto import OLDEST_GRPC, OLDEST_PROTOBUF, PROTOS, ROOT, generate


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """What is committed describes the same messages and services as what the .proto gives now, whatever the generator."""
    pytest.importorskip("grpc_tools", reason="the generator belongs to the dev extra")
    generate(tmp_path)
    for proto in PROTOS:
        committed, anew = ((root / proto.with_name(f"{proto.stem}_pb2.py")).read_text() for root in (ROOT, tmp_path))
        assert _descriptor(committed) == _descriptor(anew), "run 'make proto'"


def _descriptor(code: str) -> str:
    (line,) = [line for line in code.splitlines() if "AddSerializedFile" in line]
    return line


def test_generated_service_has_the_methods() -> None:
    """The stubs serve what the messages' descriptor says."""
    (peer,) = peer_pb2.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in peer.methods} == {"Ping", "PingVia", "Vouch"}
    assert all(callable(getattr(peer_pb2_grpc.PeerServicer, method.name)) for method in peer.methods)
    (exchange,) = exchange_pb2.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in exchange.methods} == {"Offer", "Put", "Have", "Fetch", "Verify", "Log"}
    assert all(callable(getattr(exchange_pb2_grpc.ExchangeServicer, method.name)) for method in exchange.methods)


def test_generated_code_needs_no_newer_libraries() -> None:
    """It asks for no newer versions than pyproject.toml does."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f"grpcio>={OLDEST_GRPC}" in text
    assert f"protobuf>={OLDEST_PROTOBUF[0]}" in text
    for module in (peer_pb2_grpc, exchange_pb2_grpc):
        assert f"GRPC_GENERATED_VERSION = '{OLDEST_GRPC}'" in Path(module.__file__).read_text()
