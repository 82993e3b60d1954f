"""A server that answers every request with the same few tokens at once: what is measured against it is the client.

`python -m benchmarks.instant_engine PORT` listens on loopback until it is ended.
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
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


class InstantEngine(asyncio.Protocol):
    """Counts whole requests on a kept-alive connection by their Content-Length and answers each."""

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
            self.transport.write(ANSWER)  # type: ignore[attr-defined]


async def serve(port: int) -> None:
    """Answer until cancelled."""
    server = await asyncio.get_running_loop().create_server(InstantEngine, "127.0.0.1", port, backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1])))
