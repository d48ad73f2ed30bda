"""Get tokens for SASL/OAUTHBEARER for aiokafka, as librdkafka's ``sasl.oauthbearer.method=oidc`` does.

This module uses the client credentials grant of OAuth 2.0 (RFC 6749, section 4.4): a client id and a secret are
exchanged for a token.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from jobledger.config import TOKEN_ENDPOINT, check_token_endpoint
from jobledger.errors import ConfigError, NotAuthenticated
from jobledger.kafka.tls import setting
from jobledger.process.extras import missing
from jobledger.process.logger import get_logger

try:
    from aiokafka.abc import AbstractTokenProvider
except ImportError as exc:
    raise missing("streams", exc) from exc

LOG = get_logger("jobledger.kafka")

_METHOD, _ID, _SECRET = "sasl.oauthbearer.method", "sasl.oauthbearer.client.id", "sasl.oauthbearer.client.secret"
_URL, _SCOPE, _EXTENSIONS = TOKEN_ENDPOINT, "sasl.oauthbearer.scope", "sasl.oauthbearer.extensions"
_CA, _CA_PEM = "https.ca.location", "https.ca.pem"
KNOWN = {_METHOD, _ID, _SECRET, _URL, _SCOPE, _EXTENSIONS, _CA, _CA_PEM}

#: Timeout in seconds of a request to the token endpoint.
TIMEOUT_S = 10.0
#: Share of a token's lifetime after which a new one is requested.
RENEW_AT = 0.8
#: Status codes below 500 after which a later request may succeed: request timeout, too many requests.
BUSY = (408, 429)


class ClientCredentials(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka ships no types
    """Get a token, and keep the token until a new one must be requested.

    Raises `ConfigError` for missing settings, for settings of another method, and for an endpoint to which the secret
    would be sent as plain text.
    """

    def __init__(self, kafka: Mapping[str, str]) -> None:
        if kafka.get(_METHOD, "default").lower() != "oidc":
            raise ConfigError(
                f"{setting('sasl.mechanism')}=OAUTHBEARER works only with {setting(_METHOD)}=oidc: with a client id "
                "and a secret, and the URL of a token endpoint. Tokens of another origin, such as AWS MSK's IAM, are "
                "not supported: "
                "use SASL/SCRAM or mutual TLS there"
            )
        for name in (_URL, _ID, _SECRET):
            if not kafka.get(name):
                raise ConfigError(f"{setting(_METHOD)}=oidc needs {setting(name)}")
        self._url, self._id, self._secret = kafka[_URL], kafka[_ID], kafka[_SECRET]
        check_token_endpoint(self._url)
        self._scope = kafka.get(_SCOPE)
        self._extensions = _pairs(kafka.get(_EXTENSIONS, ""))
        self._ca = (kafka.get(_CA), kafka.get(_CA_PEM))
        self._lock = threading.Lock()
        self._token, self._until, self._ends = "", 0.0, 0.0

    async def token(self) -> str:
        """Return a token that is still valid. Request a new one if needed.

        Raises `NotAuthenticated` if the endpoint refuses the request, and `ConnectionError`, which aiokafka treats as
        an unavailable broker, if the endpoint does not answer.
        """
        return await asyncio.get_running_loop().run_in_executor(None, self.fetch)

    def extensions(self) -> dict[str, str]:
        """Return the extensions that are sent to the broker with the token."""
        return dict(self._extensions)

    def fetch(self) -> str:
        """Return a token as `token` does, but block the calling thread. Callable from any thread."""
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._token, lasts = self._ask()
                except ConnectionError:
                    if time.monotonic() >= self._ends:
                        raise
                    return self._token  # the next call asks again
                now = time.monotonic()
                self._until, self._ends = now + lasts * RENEW_AT, now + lasts
            return self._token

    def _ask(self) -> tuple[str, float]:
        form = {"grant_type": "client_credentials"} | ({"scope": self._scope} if self._scope else {})
        pair = ":".join(urllib.parse.quote(word, safe="") for word in (self._id, self._secret))
        request = urllib.request.Request(
            self._url,
            urllib.parse.urlencode(form).encode(),
            {
                "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
                "Content-Type": "application/x-www-form-urlencoded",
                "Accept": "application/json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=self._tls()) as answer:
                body: Any = json.load(answer)
            return str(body["access_token"]), float(body.get("expires_in", 300.0))
        except urllib.error.HTTPError as exc:
            with exc:
                problem = f"answers {exc.code} {exc.reason}"
                if exc.code in BUSY or exc.code >= 500:
                    raise ConnectionError(f"the token endpoint {self._url} {problem}") from None
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as exc:
            if _is_away(exc):
                raise ConnectionError(f"the token endpoint {self._url} does not answer ({exc})") from exc
            problem = f"gives no token ({exc})"
        raise NotAuthenticated(f"the token endpoint {self._url} {problem}: check {setting(_ID)} and {setting(_SECRET)}")

    def _tls(self) -> ssl.SSLContext | None:
        if not self._url.startswith("https://"):
            return None
        ca_file, ca_text = self._ca
        return ssl.create_default_context(cafile=ca_file if ca_file != "probe" else None, cadata=ca_text)


def _is_away(error: Exception) -> bool:
    """Return whether a request failed because the connection failed: a later request may succeed.

    A certificate that is not accepted is not such a failure, and neither is a certificate file that cannot be read.
    """
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, ssl.SSLCertVerificationError)
    return isinstance(error, TimeoutError | ConnectionError | http.client.HTTPException)


def _pairs(text: str) -> dict[str, str]:
    pairs = [each.partition("=") for each in text.split(",") if each.strip()]
    return {name.strip(): value.strip() for name, _, value in pairs}
