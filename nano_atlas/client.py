"""JSON over HTTP to one server. Tries again what may pass, waits as the server asks, and shows no secret in its errors."""

import os
import re
import time
from itertools import count
from pathlib import Path

import httpx

from nano_atlas.errors import UserError
from nano_atlas.text import masked, parse_json

LONGEST_WAIT = 120.0  # seconds, of those that a server asks for


class ServerLost(UserError):
    """The server did not answer, or only with errors of its own, however often it was asked."""


class Client:
    """Kept-alive connections that threads may share. The key comes from OPENAI_API_KEY.

    url: paths of requests are added before its query, if it has one. connections: most requests under way at once. timeout:
    seconds for an answer, all tries and the waits between them (doubling from 1 s) included.
    """

    def __init__(self, url: str, *, connections: int = 16, timeout: float = 600.0, tries: int = 4):
        self.url, self.connections, self.timeout, self.tries = url, connections, timeout, tries
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        if not key.isascii() or any(map(str.isspace, key)):
            raise UserError("OPENAI_API_KEY has characters that no key has; copy it again")
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # no proxy leads back to this machine
        direct = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
        self._http = httpx.Client(limits=limits, headers={"Authorization": f"Bearer {key}"}, mounts=direct)

    def close(self) -> None:
        """Ends what is under way, in whichever thread."""
        self._http.close()

    def request(self, method: str, path="", body=None, choices=None, tries=None, timeout=None) -> dict:
        """The server's JSON answer (`{}` where it is empty). choices: how many it must hold.

        Other answers, 408, 429, 5xx and transport errors are tried again, then raise ServerLost; any other status raises UserError.
        A wait that the server asks for is no try, but must end within the timeout.
        """
        base, mark, query = self.url.partition("?")
        deadline = time.monotonic() + (timeout or self.timeout)
        for attempt in count(1):
            left, told = deadline - time.monotonic(), 0.0
            # no limit on the wait for a free connection: it says how much there is to do, not how the server is
            patience = httpx.Timeout(left, connect=min(left, 10.0), pool=None)
            try:
                response = self._http.request(method, base + path + mark + query, json=body, timeout=patience)
            except (httpx.RequestError, httpx.InvalidURL, ValueError) as error:
                cause = f"{type(error).__name__}: {error}"
                # else it is a wrong address, or what cannot be sent
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
    """The answer, and what is wrong with it."""
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
