"""A server that answers every request with the same few tokens at once: what is measured against it is the client.

`python -m benchmarks.instant_engine PORT [N]` listens on 127.0.0.1 to 127.0.0.N, N engines in one process, until it is
ended. `GET /count` answers how many requests to generate there have been.
"""

from __future__ import annotations

import asyncio
import json
import sys

NUM_TOKENS = 8
_LOG_PROBS = [[-0.5, 100 + i, None] for i in range(NUM_TOKENS)]
_META = {
    "id": "0",
    "finish_reason": {"type": "stop", "matched": 1},
    "prompt_tokens": 16,
    "completion_tokens": NUM_TOKENS,
    "cached_tokens": 0,
    "weight_version": "0",
    "output_token_logprobs": _LOG_PROBS,
}
_BODY = json.dumps({"text": "42", "output_ids": [entry[1] for entry in _LOG_PROBS], "meta_info": _META}).encode()


def _answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


GENERATED = _answer(_BODY)
OTHERS = {
    b"get /health": _answer(b""),
    b"post /abort_request": _answer(b'{"success": true}'),
}
NOT_FOUND = _answer(b"", b"404 Not Found")  # /workers too: this is an engine, not a router


class InstantEngine(asyncio.Protocol):
    """Counts whole requests on a kept-alive connection by their Content-Length and answers each."""

    num_generated = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.transport.write(self.answer(head))  # type: ignore[attr-defined]

    def answer(self, head: bytes) -> bytes:
        """What goes back to a request with this head, in lower case."""
        if head.startswith(b"post /generate "):
            InstantEngine.num_generated += 1
            return GENERATED
        if head.startswith(b"get /count "):
            return _answer(b"%d" % self.num_generated)
        return OTHERS.get(head[: head.index(b" http/")], NOT_FOUND)


async def serve(port: int, num_addresses: int) -> None:
    """Answer until cancelled."""
    addresses = [f"127.0.0.{number}" for number in range(1, num_addresses + 1)]
    server = await asyncio.get_running_loop().create_server(InstantEngine, addresses, port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    from slime.utils.processes import raise_open_file_limit

    raise_open_file_limit()
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
