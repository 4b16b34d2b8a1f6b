"""JSON over HTTP to one server. Retries temporary errors, waits as long as the server asks, masks secrets in errors."""

import os
import re
import time
from itertools import count
from pathlib import Path

import httpx

from nano_atlas.errors import UserError
from nano_atlas.text import masked, parse_json

LONGEST_WAIT = 120.0  # seconds; the longest Retry-After that is followed


class ServerLost(UserError):
    """After all retries the server did not answer, or answered with errors of its own."""


class Client:
    """Keep-alive connections, shared between threads. The key comes from OPENAI_API_KEY.

    url: request paths are added before its query. connections: most concurrent requests. timeout: seconds for
    an answer, including all tries and the waits between them (doubling from 1 s).
    """

    def __init__(self, url: str, *, connections: int = 16, timeout: float = 600.0, tries: int = 4):
        self.url, self.connections, self.timeout, self.tries = url, connections, timeout, tries
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        if not key.isascii() or any(map(str.isspace, key)):
            raise UserError("OPENAI_API_KEY has spaces or non-ASCII characters; copy it again")
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # requests to this machine bypass the proxy
        direct = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
        self._http = httpx.Client(limits=limits, headers={"Authorization": f"Bearer {key}"}, mounts=direct)

    def close(self) -> None:
        """Aborts running requests of all threads."""
        self._http.close()

    def request(self, method: str, path="", body=None, choices=None, tries=None, timeout=None) -> dict:
        """The server's JSON answer (`{}` if it is empty). choices: how many it must hold.

        Malformed answers, 408, 429, 5xx and transport errors are retried, then raise ServerLost; any other status raises
        UserError. A wait that the server asks for does not count as a try, but must end within the timeout.
        """
        base, mark, query = self.url.partition("?")
        deadline = time.monotonic() + (timeout or self.timeout)
        for attempt in count(1):
            left, told = deadline - time.monotonic(), 0.0
            # no limit on the wait for a free connection: it depends on our load, not on the server
            patience = httpx.Timeout(left, connect=min(left, 10.0), pool=None)
            try:
                response = self._http.request(method, base + path + mark + query, json=body, timeout=patience)
            except (httpx.RequestError, httpx.InvalidURL, ValueError) as error:
                cause = f"{type(error).__name__}: {error}"
                # final: a wrong address, or a body that cannot be sent
                is_final = not isinstance(error, httpx.RequestError)
            else:
                answer, cause = _read_answer(response, choices)
                if cause is None:
                    return answer
                asked = response.headers.get("Retry-After", "")
                told = min(float(asked), LONGEST_WAIT) if re.fullmatch(r"\d+(\.\d+)?", asked) else 0.0
                is_final = response.status_code not in (200, 408, 429) and response.status_code < 500
            pause = max(told, min(2.0 ** (attempt - 1), 20.0))
            is_last = attempt >= (tries or self.tries) and not told
            if is_final or is_last or pause >= deadline - time.monotonic():
                break
            time.sleep(pause)
        what = f"{self.url}{path} failed ({cause}); check that the server is up and serves this model"
        raise (UserError if is_final else ServerLost)(masked(what))


def _read_answer(response: httpx.Response, choices: int | None) -> tuple[dict, str | None]:
    """(the answer, what is wrong with it or None)"""
    text = response.content.decode("utf-8-sig", "replace")
    shown = " ".join(masked(text).split())[:300]
    if not response.is_success:
        return {}, f"HTTP {response.status_code}: {shown}"
    try:
        answer = parse_json(text, read_float=float) if text.strip() else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return {}, f"not JSON, or no object: {shown!r}"
    found = answer.get("choices") if isinstance(answer.get("choices"), list) else []
    return answer, None if choices in (None, len(found)) else f"{len(found)} choices, not {choices}: {shown}"


def is_url(spec: str) -> bool:
    """Raises UserError for an address without its http://."""
    if re.match(r"(post\+)?([\w.-]+|\[.+\]):\d+([/?#]|$)", spec) and not Path(spec).exists():
        raise UserError(f"{spec}: to name a server, write " + re.sub(r"^(post\+)?", r"\1http://", spec))
    return spec.startswith(("http://", "https://"))
