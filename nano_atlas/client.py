"""JSON over HTTP with patience: what the seats and the vLLM sampler send their requests through."""

import os
import time
from collections.abc import Callable

import httpx

from nano_atlas.errors import UserError


class ServerLost(UserError):
    """The server did not answer, or only with errors of its own, however often it was asked. A restart may mend that."""


class Client:
    """Requests to one server over kept-alive connections; threads may share it.

    url: of the server, with or without `/v1` or `/v1/chat/completions`; paths of requests begin with `/`. connections: most
    requests under way at once. timeout: seconds until an answer must be there. tries: attempts per request, the waits between
    them doubling from 1 s. The key comes from OPENAI_API_KEY and is never shown, not even where a server repeats it.
    """

    def __init__(self, url: str, *, connections: int = 16, timeout: float = 120.0, tries: int = 4):
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.connections, self.tries = connections, tries
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # No limit on the wait for a free connection: it says how much there is to do, not how the server is.
        patience = httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None)
        is_local = "//127.0.0.1" in url or "//localhost" in url  # no proxy leads back to this machine
        headers = {"Authorization": f"Bearer {self._key}"}
        self._http = httpx.Client(timeout=patience, limits=limits, headers=headers, trust_env=not is_local)

    def close(self) -> None:
        """Ends what is under way, in whichever thread."""
        self._http.close()

    def request(self, method: str, path: str, body: dict | None = None, *, tries: int | None = None,
                timeout: float | None = None, check: Callable[[dict], str | None] = lambda answer: None) -> dict:  # fmt: skip
        """The server's JSON answer (`{}` where it is empty).

        `check` says what is wrong with an answer of status 200, if anything is. That, 429, 5xx and transport errors are tried
        again; then ServerLost is raised with the last cause. Any other status is a refusal: UserError at once.
        """
        tries, failure = tries or self.tries, ServerLost
        patience = httpx.USE_CLIENT_DEFAULT if timeout is None else timeout
        for attempt in range(tries):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 20.0))
            try:
                response = self._http.request(method, self.url + path, json=body, timeout=patience)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                cause, failure = f"{type(error).__name__}: {error}", UserError
                break
            except httpx.RequestError as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                try:
                    answer = response.json() if response.content else {}
                    cause = (
                        check(answer)
                        if isinstance(answer, dict)
                        else f"not a JSON object: {response.text[:200]!r}"
                    )
                except ValueError:
                    cause = f"not JSON: {response.text[:200]!r}"
                if cause is None:
                    return answer
                continue
            cause = f"HTTP {response.status_code}: {response.text[:400]}"
            if response.status_code != 429 and response.status_code < 500:
                failure = UserError
                break
        cause = cause.replace(self._key, "***")
        raise failure(f"{self.url}{path} failed ({cause}); check that the server is up and serves this model")


def check_choices(count: int) -> Callable[[dict], str | None]:
    """For `Client.request`: an answer must hold `count` choices."""

    def fault(answer: dict) -> str | None:
        choices = answer.get("choices")
        if isinstance(choices, list) and len(choices) == count:
            return None
        return f"{len(choices) if isinstance(choices, list) else 'no'} choices in the answer, not {count}: {str(answer)[:200]}"

    return fault
