"""What plain gRPC takes between two processes of this machine, without anything of ours: the floor of checkpoints.

`python -m etcdreplica.testing.grpc_floor FILE` is the other side: it answers small messages, and writes large ones to a file
that it flushes.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from etcdreplica.clock import boottime

PIECE = 1 << 20
PAUSE_S = 1.0  # before each large state, here and for ours: what was written before has reached the disk
_OPTIONS = (("grpc.max_receive_message_length", 64 << 20),)


class GrpcFloor:
    """The other side as a process, and calls to it. Times are milliseconds."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "floor"
        self._process: subprocess.Popen[str] | None = None
        self._address = ""

    def __enter__(self) -> GrpcFloor:
        command = [sys.executable, "-m", __name__, str(self._file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
        self._file.unlink(missing_ok=True)

    def round_trips(self, rounds: int, pause_s: float) -> list[float]:
        """Send one small message at a time, and wait for its answer."""
        return asyncio.run(self._round_trips(rounds, pause_s))

    def stream_round_trips(self, rounds: int, pause_s: float) -> list[float]:
        """Send one small message at a time on one stream, and wait for its answer."""
        return asyncio.run(self._stream_round_trips(rounds, pause_s))

    def stream(self, size: int, rounds: int) -> list[float]:
        """Send so many bytes in one stream, and wait until they are flushed on the other side."""
        return asyncio.run(self._stream(size, rounds))

    async def _round_trips(self, rounds: int, pause_s: float) -> list[float]:
        found = []
        async with grpc.aio.insecure_channel(self._address) as channel:
            echo = channel.unary_unary("/floor/Echo")
            await echo(b"")
            for _ in range(rounds):
                await asyncio.sleep(pause_s)
                started = boottime()
                await echo(bytes(1024))
                found.append(1000 * (boottime() - started))
        return found

    async def _stream_round_trips(self, rounds: int, pause_s: float) -> list[float]:
        found = []
        async with grpc.aio.insecure_channel(self._address) as channel:
            call = channel.stream_stream("/floor/EchoStream")()
            for number in range(rounds + 1):
                await asyncio.sleep(pause_s)
                started = boottime()
                await call.write(bytes(32))
                await call.read()
                if number:  # the first one opens the stream
                    found.append(1000 * (boottime() - started))
            call.cancel()
        return found

    async def _stream(self, size: int, rounds: int) -> list[float]:
        found, piece = [], os.urandom(PIECE)
        async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
            store = channel.stream_unary("/floor/Store")
            for _ in range(rounds):
                await asyncio.sleep(PAUSE_S)
                started = boottime()
                call = store()
                for _ in range(size // PIECE):
                    await call.write(piece)
                await call.done_writing()
                await call
                found.append(1000 * (boottime() - started))
        return found


async def _serve(path: str) -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return request

    async def echo_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def store(requests: AsyncIterator[bytes], context: Any) -> bytes:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            async for piece in requests:
                os.write(fd, piece)
            await asyncio.to_thread(os.fsync, fd)
        finally:
            os.close(fd)
        return b""

    server = grpc.aio.server(options=_OPTIONS)
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "EchoStream": grpc.stream_stream_rpc_method_handler(echo_stream),
        "Store": grpc.stream_unary_rpc_method_handler(store),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this is gone
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
