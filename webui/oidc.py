"""Sign-in through an OpenID provider: OpenID Connect's authorization code flow with PKCE.

The browser is sent to the provider and comes back with a code, for which this server fetches an ID token. The token
counts only with the provider's signature, for this client, unexpired, and for the very sign-in that this browser has
begun: a signed cookie keeps its state, nonce and verifier meanwhile. Who may come in, and as what, is in the users
file. Anybody can begin a sign-in, so what the provider says of itself is kept, also that it does not answer. Needs
joserfc (requirements-oidc.txt).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import quote_plus, urlencode, urlsplit

import httpx
from itsdangerous import BadData, URLSafeTimedSerializer

from engine.core.problems import Refusal, problem
from engine.core.sockets import is_loopback

SCOPE = "openid profile email"
# Those with a key pair: with "none" or a shared secret, a token could be made by others.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
MAX_SIGN_IN_SECONDS = 600  # from leaving for the provider to coming back
KEPT_SECONDS = 3600  # after which the provider's addresses and keys are fetched again
RETRY_SECONDS = 10  # after which they are, if they could not be fetched, or do not fit a token
MAX_CONCURRENT_REQUESTS = 4  # to the provider
TIMEOUT_SECONDS = 10
LEEWAY_SECONDS = 60  # between the clocks of provider and studio
MAX_TARGET = 2000


@dataclass(frozen=True)
class Provider:
    """What an operator knows of the provider. `claim` is the part of the ID token that names the user."""

    issuer: str
    client_id: str
    client_secret: str
    claim: str = "preferred_username"


class Begun(NamedTuple):
    """A sign-in that a browser has begun; `target` is the page to show afterwards."""

    nonce: str
    verifier: str
    target: str


class Kept:
    """What `fetch` returns, kept for KEPT_SECONDS; a refusal, for RETRY_SECONDS. Fetched once for all who wait."""

    def __init__(self, fetch: Callable[[], Awaitable[Mapping[str, Any]]]):
        self.fetch, self.lock = fetch, asyncio.Lock()
        self.since, self.answer = 0.0, cast("Mapping[str, Any] | Refusal | None", None)

    async def get(self, seconds: float = KEPT_SECONDS) -> Mapping[str, Any]:
        """The answer, at most `seconds` old. Raises Refusal."""
        async with self.lock:
            limit = RETRY_SECONDS if isinstance(self.answer, Refusal) else seconds
            if self.answer is None or time.monotonic() - self.since > limit:
                try:
                    self.answer = await self.fetch()
                except Refusal as refusal:
                    self.answer = refusal
                self.since = time.monotonic()
            if isinstance(self.answer, Refusal):
                raise Refusal(self.answer.problems)
            return self.answer


class Oidc:
    """The studio as a client of a provider; `key` signs the cookies. Raises Refusal if the provider's address is not
    safe, or packages are missing."""

    def __init__(self, provider: Provider, key: bytes):
        address = urlsplit(provider.issuer)
        if address.scheme != "https" and not (address.scheme == "http" and is_loopback(address.hostname or "")):
            raise Refusal(problem("oidc-issuer", given=provider.issuer[:200]))
        if importlib.util.find_spec("joserfc") is None:
            raise Refusal(problem("oidc-package", package="joserfc"))
        self.provider, self.serializer = provider, URLSafeTimedSerializer(key, salt="oidc")
        self.addresses, self.keys = Kept(self._discover), Kept(self._fetch_keys)
        self.asking = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

    @property
    def name(self) -> str:
        """The provider's host, for the login page."""
        return urlsplit(self.provider.issuer).hostname or ""

    async def begin(self, redirect_uri: str, target: str) -> tuple[str, str]:
        """The address to send the browser to, and the value of its cookie meanwhile; `target` is the page to show
        afterwards. Raises Refusal if the provider cannot be reached."""
        addresses = await self.addresses.get()
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self.provider.client_id,
            "redirect_uri": redirect_uri,
            "scope": SCOPE,
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        address = addresses["authorization_endpoint"]
        url = f"{address}{'&' if '?' in address else '?'}{urlencode(query)}"
        return url, self.serializer.dumps([state, nonce, verifier, target[:MAX_TARGET]])

    def begun(self, query: Mapping[str, str], cookie: str) -> Begun:
        """The sign-in with which a browser comes back. Raises Refusal if it has not begun this one."""
        try:
            state, nonce, verifier, target = self.serializer.loads(cookie, max_age=MAX_SIGN_IN_SECONDS)
        except (BadData, ValueError):
            raise Refusal(problem("oidc-not-begun")) from None
        if not secrets.compare_digest(query.get("state", "").encode(), state.encode()):
            raise Refusal(problem("oidc-not-begun"))
        return Begun(nonce, verifier, target)

    async def finish(self, query: Mapping[str, str], begun: Begun, redirect_uri: str) -> str:
        """The user's name according to the provider. Raises Refusal if anything is not as begun."""
        if "code" not in query:
            why = query.get("error_description") or query.get("error") or "—"
            raise Refusal(problem("oidc-refused", name=self.name, why=why[:200]))
        claims = await self._claims(query["code"], begun, redirect_uri)
        name = claims.get(self.provider.claim)
        # An address that nobody has confirmed may be another's.
        if not isinstance(name, str) or (self.provider.claim == "email" and claims.get("email_verified") is not True):
            raise Refusal(problem("oidc-claim", claim=self.provider.claim, name=self.name))
        return name

    async def _claims(self, code: str, begun: Begun, redirect_uri: str) -> Mapping[str, Any]:
        """The content of the ID token for this code. Raises Refusal."""
        from joserfc import jwt
        from joserfc.errors import JoseError

        addresses, provider = await self.addresses.get(), self.provider
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": begun.verifier,
        }
        secret = (quote_plus(provider.client_id), quote_plus(provider.client_secret))  # RFC 6749, 2.3.1
        token = await self._ask("POST", addresses["token_endpoint"], data=form, auth=secret)
        rules = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": self.provider.issuer},
            aud={"essential": True, "value": self.provider.client_id},
            exp={"essential": True},
            nonce={"essential": True, "value": begun.nonce},
        )
        try:
            claims = await self._signed(str(token.get("id_token", "")))
            rules.validate(claims)
        except (JoseError, ValueError) as error:
            raise Refusal(problem("oidc-token", name=self.name, why=str(error)[:200])) from None
        return claims

    async def _signed(self, token: str) -> dict[str, Any]:
        """What the provider has signed. If its known keys do not fit, it may have new ones. Raises JoseError,
        ValueError or Refusal."""
        from joserfc import jwt
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        def decode(keys: Mapping[str, Any]) -> dict[str, Any]:
            return jwt.decode(token, KeySet.import_key_set(cast(Any, keys)), ALGORITHMS).claims

        try:
            return decode(await self.keys.get())
        except (JoseError, ValueError):
            return decode(await self.keys.get(RETRY_SECONDS))

    async def _fetch_keys(self) -> Mapping[str, Any]:
        return await self._ask("GET", (await self.addresses.get())["jwks_uri"])

    async def _discover(self) -> Mapping[str, Any]:
        """The provider's addresses, by OpenID Connect Discovery."""
        url = f"{self.provider.issuer.rstrip('/')}/.well-known/openid-configuration"
        addresses = await self._ask("GET", url)
        needed = ("issuer", "authorization_endpoint", "token_endpoint", "jwks_uri")
        if any(not isinstance(addresses.get(name), str) for name in needed):
            raise Refusal(problem("oidc-unreachable", name=self.name, why=f"{url}: {', '.join(needed)}"))
        if addresses["issuer"] != self.provider.issuer:  # another provider's answer (RFC 9207's mix-up)
            raise Refusal(problem("oidc-other-issuer", given=self.provider.issuer, issuer=addresses["issuer"][:200]))
        return addresses

    async def _ask(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        """The JSON object that the provider answers. Raises Refusal if it does not."""
        try:
            async with self.asking, httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client:
                answer = (await client.request(method, url, **request)).raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise Refusal(problem("oidc-unreachable", name=self.name, why=(str(error) or repr(error))[:200])) from None
        if not isinstance(answer, dict):
            raise Refusal(problem("oidc-unreachable", name=self.name, why=url))
        return answer
