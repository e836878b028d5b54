"""Writes the gRPC code that comes from the .proto files. `python tests/generate_proto.py` (make proto).

The generated code asks at import for the versions of its generator, although it needs far less: these are replaced by the
oldest versions that pyproject.toml allows, so that a newer generator does not force newer libraries on users.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = (Path("etcdreplica/daemon/peer.proto"), Path("etcdreplica/checkpoint/exchange.proto"))
OLDEST_GRPC = "1.66.2"
OLDEST_PROTOBUF = (5, 27, 2)  # what that grpcio-tools writes


def generate(target: Path) -> None:
    """Write the code below `target`."""
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={target}", f"--grpc_python_out={target}"]
    subprocess.run([*command, *map(str, PROTOS)], cwd=ROOT, check=True)
    numbers, old = ",".join(f"\n    {number}" for number in OLDEST_PROTOBUF), "GRPC_GENERATED_VERSION = "
    for proto in PROTOS:
        messages, service = (target / proto.with_name(f"{proto.stem}_pb2{suffix}.py") for suffix in ("", "_grpc"))
        messages.write_text(re.sub(r"(Domain\.PUBLIC)(,\s+\d+){3}", rf"\1,{numbers}", messages.read_text()))
        service.write_text(re.sub(rf"{old}'[^']+'", f"{old}'{OLDEST_GRPC}'", service.read_text()))


if __name__ == "__main__":
    generate(ROOT)
