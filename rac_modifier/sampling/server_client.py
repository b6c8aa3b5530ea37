"""One OpenAI-compatible server: the models that it lists, and completions that pass our checks.

The `openai` client does retries, back-off and time-outs. An answer that fails a check of `completions_api` is asked for again, as
part of the same number of tries.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import Request, UnusableError, error_text, read_answer
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

try:
    import openai
except ImportError as error:
    raise RacError(
        "sampling from a server needs openai: `pip install 'rac-modifier[compress]'`"
    ) from error

PAUSE = 1.0  # seconds before an answer that failed a check is asked for again
_TRANSIENT = frozenset(
    {408, 409, 425, 429}
)  # and every 5xx; another status is the same when the request is sent again
_REFUSALS = frozenset({400, 413, 422})  # of this prompt, not of the next
_SETUP_TIMEOUT = 30.0
_CONNECT_TIMEOUT = 10.0
# openai would send organization and project of its own environment variables to any server, and what kind of machine this is.
# Each header also takes time, here and at the server.
_STAINLESS = (
    "Lang",
    "Package-Version",
    "OS",
    "Arch",
    "Runtime",
    "Runtime-Version",
    "Async",
    "Read-Timeout",
)
_NOT_SENT = (
    "OpenAI-Organization",
    "OpenAI-Project",
    *(f"X-Stainless-{name}" for name in _STAINLESS),
)


class GaveUpError(Exception):
    """A server did not complete a prompt in the given tries; another server, or a later try, may."""


class RefusedError(Exception):
    """A server will not complete this prompt, however often it is asked."""


class ServerClient:
    """One base URL.

    Attributes:
        url: it ends in /v1.
        under_way: completions that are waited for.
        failing: the last completion failed, after all its tries.

    Args:
        url: see above.
        settings: time-outs, tries, key.
        tokenize: for answers without token ids; None: they are refused.

    Raises:
        RacError: the settings name an API key that is not there.
    """

    def __init__(
        self,
        url: str,
        settings: EngineSettings,
        tokenize: Callable[[str], Sequence[int]] | None = None,
    ):
        self.url = url
        self._tokenize = tokenize
        self.under_way = 0
        self.failing = False
        self._timeout = settings.timeout
        key = _api_key(settings.api_key_env)
        self._headers = dict.fromkeys(_NOT_SENT, openai.Omit())
        if key is None:
            self._headers["Authorization"] = openai.Omit()
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=openai.Timeout(
                settings.timeout, connect=min(_CONNECT_TIMEOUT, settings.timeout), pool=None
            ),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def list_models(self) -> bytes:
        """The body of the answer to GET /v1/models.

        Raises:
            RacError: no server there, or it answers with an error.
        """
        client = self._client.with_options(timeout=_SETUP_TIMEOUT, max_retries=0)
        try:
            return (await client.models.with_raw_response.list(extra_headers=self._headers)).content
        except openai.APIStatusError as error:
            status = error.status_code
            raise RacError(
                f"{self.url}/models answers {status} ({error_text(error.body)}); {_way_out(status)}"
            ) from error
        except openai.APIConnectionError as error:
            raise RacError(
                f"no server answers at {self.url} ({_cause(error)}); start it, or correct base_urls"
            ) from error

    async def complete(
        self,
        request: Request,
        *,
        model: str,
        vocab_size: int,
        sampling: SamplingSettings,
        tries: int,
    ) -> Generation:
        """Ask up to `tries` times, until an answer passes the checks.

        Raises:
            GaveUpError: no try succeeded.
            RefusedError: the server rejects the prompt.
            RacError: the server cannot give traces, or wants a key.
        """
        self.under_way += 1
        try:
            generation = await self._insist(request, model, vocab_size, sampling, tries)
        except GaveUpError as error:
            if not self.failing:
                logger.warning(str(error))
            self.failing = True
            raise
        finally:
            self.under_way -= 1
        self.failing = False
        return generation

    async def _insist(
        self, request: Request, model: str, vocab_size: int, sampling: SamplingSettings, tries: int
    ) -> Generation:
        body = request.body(model, sampling)
        while True:
            try:
                # Not `completions.create`: it looks through each list of token ids, which takes nearly as long as all the rest.
                answer: openai.AsyncAPIResponse[object] = await self._client.post(
                    "/completions",
                    cast_to=openai.AsyncAPIResponse[object],
                    body=body,
                    options={"headers": self._headers, "max_retries": tries - 1},
                )
                return read_answer(
                    request, await answer.read(), vocab_size, self.url, self._tokenize
                )
            except UnusableError as error:
                tries -= answer.retries_taken + 1
                if tries < 1:
                    raise GaveUpError(f"{self.url}: {error}") from error
                await asyncio.sleep(PAUSE)
            except openai.APIStatusError as error:
                raise self._of_status(error) from error
            except openai.APITimeoutError as error:
                reason = f"no answer within timeout={self._timeout:g} s; set a longer one"
                raise GaveUpError(f"{self.url}: {reason}") from error
            except openai.APIConnectionError as error:
                raise GaveUpError(f"{self.url}: {_cause(error)}") from error

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        status = error.status_code
        message = f"{self.url} answers {status}: {error_text(error.body)}"
        if status in _TRANSIENT or status >= 500:
            return GaveUpError(message)
        return (
            RefusedError(message)
            if status in _REFUSALS
            else RacError(f"{message}; {_way_out(status)}")
        )


def _api_key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise RacError(
            f"api_key_env names {variable!r}, which is not set; export it, or leave api_key_env out"
        )
    return None if variable is None else os.environ[variable]


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "the server wants a key: name the environment variable that holds it with engine.api_key_env"
    return "check base_urls (they end in /v1) and engine.model"


def _cause(error: openai.APIConnectionError) -> str:
    """The connection's own error; openai's is only "Connection error."."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".rstrip(": ")
