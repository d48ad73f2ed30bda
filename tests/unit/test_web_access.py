"""Who may use the HTTP API: tokens, a trusted proxy, callbacks, this machine's user, and requests of other sites."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from jobledger import App, ConfigError
from jobledger.web import Role, TokenFile, TrustedProxy, User, create_app
from jobledger.web.access import API, ROUTES, is_loopback
from jobledger.web.origin import SAFE, refusal
from tests.web import STARTED, SUBMITTED, Table, build, client

READER, BOSS = User("rita", Role.READ), User("ann", Role.ADMIN)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """An app with two jobs and one plan in its table."""
    table = Table(tmp_path)
    with closing(table.store):
        table.write({"job-1": [SUBMITTED, STARTED], "job-2": [SUBMITTED]})
        table.plan()
        made = build(table.url)
        yield made
        made.close()


def ask(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """Return the answer to one request."""

    async def one() -> httpx.Response:
        async with client(api) as asker:
            return await asker.request(method, path, **options)

    return asyncio.run(one())


def filled(path: str) -> str:
    """Return a route's path with values for its parameters."""
    return path.format(job_id="job-1", plan_id="plan-1", name="default" if "/queues" in path else "add")


def operations(api: FastAPI) -> list[tuple[str, str]]:
    """Return method and path of each route in the OpenAPI document."""
    paths = api.openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


# -- roles ---------------------------------------------------------------------------------------------------------


def test_a_user_who_may_only_read_changes_nothing_by_any_route(app: App) -> None:
    """Each route of the OpenAPI document that is not a GET answers 403 to the role `read`, before it looks at the
    request; and each of them needs a role above."""
    api = create_app(app, user=lambda request: READER)
    changing = [(method, path) for method, path in operations(api) if method not in SAFE]
    assert len(changing) == 14
    for method, path in changing:
        answer = ask(api, method, filled(path), json={"no": "such body"}, params={"unknown": "1"})
        assert answer.status_code == 403, (method, path)
        assert "rita has the role read" in answer.json()["detail"]
        action = ROUTES[f"{method} {path}"]
        assert action is not None
        assert action.role > Role.READ


def test_every_route_has_a_rule_and_every_rule_a_route(app: App) -> None:
    """The table of roles has the routes of the OpenAPI document, and the one of the document itself."""
    api = create_app(app, local=True)
    assert {*ROUTES} == {f"{method} {path}" for method, path in operations(api)} | {f"GET {API}/openapi.json"}


def test_a_route_without_a_rule_is_refused(app: App) -> None:
    """A route that somebody adds without a rule answers 403, also to an admin."""
    from fastapi import APIRouter, Depends

    from jobledger.web.access import admitted

    api = create_app(app, local=True)
    extra = APIRouter()
    extra.add_api_route("/extra", lambda: "secret", methods=["GET"])
    api.include_router(extra, dependencies=[Depends(admitted)])
    answer = ask(api, "GET", "/extra")
    assert (answer.status_code, answer.json()["title"]) == (403, "Not allowed")


def test_without_a_way_in_there_is_no_app(app: App) -> None:
    """The API is never open because an argument was forgotten."""
    with pytest.raises(ConfigError, match="must know who asks"):
        create_app(app)


@pytest.mark.parametrize("prefix", ["jobs", "/jobs/", "/jobs?x", "/"])
def test_a_prefix_that_is_no_path_is_refused(app: App, prefix: str) -> None:
    """The error names the value."""
    with pytest.raises(ConfigError, match="must begin with a slash"):
        create_app(app, local=True, prefix=prefix)


def test_permit_decides_about_one_job(app: App) -> None:
    """The callback gets the user, the action and the target, also one in the body, and its refusal is a 403."""
    asked: list[tuple[str, str, str | None]] = []

    async def permit(user: User, action: str, target: str | None) -> bool:
        asked.append((user.name, action, target))
        return action == "jobs.read"

    api = create_app(app, user=lambda request: BOSS, permit=permit)
    assert ask(api, "GET", f"{API}/jobs/job-1?args=false").status_code == 200
    refused = ask(api, "POST", f"{API}/jobs/job-1:cancel")
    assert (refused.status_code, refused.json()["detail"]) == (403, "ann is not permitted jobs.cancel of job-1")
    assert ask(api, "POST", f"{API}/jobs", json={"task": "add", "args": {"a": 1}}).status_code == 403
    assert ask(api, "POST", f"{API}/jobs:batch", json={"jobs": [{"task": "add", "args": {"a": 1}}]}).status_code == 403
    assert asked == [
        ("ann", "jobs.read", "job-1"),
        ("ann", "jobs.cancel", "job-1"),
        ("ann", "jobs.submit", "add"),
        ("ann", "jobs.submit", "add"),
    ]


def test_a_mounted_api_asks_the_app_around_it_and_links_to_its_own_place(app: App) -> None:
    """The callback gets the request; None is a 401. Links begin with the place of the mount, with and without
    ``prefix``."""

    def user(request: Request) -> User | None:
        name = request.headers.get("x-test-user")
        return None if name is None else User(name, Role.OPERATE)

    for prefix in ("", "/inner"):
        around: Any = Starlette(routes=[Mount("/inner", create_app(app, prefix=prefix, user=user))])
        assert ask(around, "GET", f"/inner{API}/me").status_code == 401
        answer = ask(around, "GET", f"/inner{API}/me", headers={"x-test-user": "eve"})
        assert answer.json() == {"name": "eve", "role": "operate"}
    with_links = create_app(app, prefix="/inner", user=lambda request: BOSS)
    assert (
        ask(with_links, "GET", f"{API}/jobs?limit=1&task=add").json()["next"]
        == f"/inner{API}/jobs?limit=1&task=add&after=job-2"
    )


# -- tokens --------------------------------------------------------------------------------------------------------


def test_a_token_opens_the_api_until_it_is_revoked(app: App, tmp_path: Path) -> None:
    """A request without a token, or with another one, is a 401 that says how to log in. A token that is added or revoked
    while the service runs counts at once."""
    file = TokenFile(tmp_path / "tokens.json")
    file.add("root", Role.ADMIN)
    api = create_app(app, tokens=file)
    refused = ask(api, "GET", f"{API}/me")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="jobledger"')
    token, text = TokenFile(file.path).add("ann", Role.OPERATE)
    login = {"Authorization": f"Bearer {text}"}
    assert ask(api, "GET", f"{API}/me", headers=login).json() == {"name": "ann", "role": "operate"}
    for wrong in (text[:-1], text + "x", text.replace("jl_", "xx_"), "", "jl__", "é"):
        header = {"Authorization": f"Bearer {wrong}".encode()}
        assert ask(api, "GET", f"{API}/me", headers=header).status_code == 401
    TokenFile(file.path).revoke(token.id)
    assert ask(api, "GET", f"{API}/me", headers=login).status_code == 401


def test_the_file_has_only_hashes_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    """Neither the token nor its secret part is in the file, whose mode is 0600."""
    file = TokenFile(tmp_path / "tokens.json")
    _, text = file.add("ann", Role.READ)
    assert text.split("_", 2)[2] not in file.path.read_text("utf-8")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.json", "tokens.json.lock"]
    assert [(each.name, each.role) for each in file.tokens()] == [("ann", "read")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 2}', "has version 2, but this Jobledger reads 1"),
        ('{"version": 1, "tokens": [{"id": "1", "name": "a", "role": "boss", "sha256": "00", "created_at": ""}]}', "'boss' is not a role"),
        ('{"version": 1, "tokens": [{"id": "1", "name": "a", "role": "read", "sha256": "xy", "created_at": ""}]}', "is not one"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_lets_nobody_in(app: App, tmp_path: Path, text: str, expected: str) -> None:
    """At the start the error names the file; while the service runs, requests are answered with 503."""
    file = TokenFile(tmp_path / "tokens.json")
    _, token = file.add("ann", Role.READ)
    api = create_app(app, tokens=file)
    assert ask(api, "GET", f"{API}/me", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    file.path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        TokenFile(file.path).check()
    assert ask(api, "GET", f"{API}/me", headers={"Authorization": f"Bearer {token}"}).status_code == 503


def test_a_file_that_others_may_change_is_refused(tmp_path: Path) -> None:
    """The error says what to do."""
    file = TokenFile(tmp_path / "tokens.json")
    with pytest.raises(ConfigError, match="`jobledger web-token add NAME"):
        file.check()
    file.add("ann", Role.READ)
    os.chmod(file.path, 0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        TokenFile(file.path).check()


def test_an_unknown_id_is_not_revoked(tmp_path: Path) -> None:
    """The error names the ids that the file has."""
    file = TokenFile(tmp_path / "tokens.json")
    token, _ = file.add("ann", Role.READ)
    with pytest.raises(ConfigError, match=f"'nope'; its ids: {token.id}"):
        file.revoke("nope")


# -- the proxy -----------------------------------------------------------------------------------------------------


def test_a_proxy_names_the_user_and_the_role(app: App) -> None:
    """The header counts only from the addresses of the proxy, once, and as valid text."""
    proxy = TrustedProxy("X-User", ["127.0.0.0/8"], role_header="X-Role")
    api = create_app(app, proxy=proxy)
    assert ask(api, "GET", f"{API}/me", headers={"X-User": "ann", "X-Role": "admin"}).json()["role"] == "admin"
    assert ask(api, "GET", f"{API}/me", headers={"X-User": "ann"}).json() == {"name": "ann", "role": "read"}
    assert ask(api, "GET", f"{API}/me", headers={"X-User": "Zoë".encode()}).json()["name"] == "Zoë"
    for headers in (
        [],
        [("X-User", "ann"), ("X-User", "eve")],
        [("X-User", "")],
        [("X-User", "a"), ("X-Role", "boss")],
    ):
        assert ask(api, "GET", f"{API}/me", headers=headers).status_code == 401
    elsewhere = create_app(app, proxy=TrustedProxy("X-User", ["10.0.0.5"]))
    assert ask(elsewhere, "GET", f"{API}/me", headers={"X-User": "ann"}).status_code == 401


def test_a_proxy_needs_its_addresses() -> None:
    """Without them anybody could be anybody."""
    with pytest.raises(ConfigError, match="give the addresses of the proxy"):
        TrustedProxy("X-User", [])
    with pytest.raises(ConfigError, match=r"'proxy\.local' is not the address or network"):
        TrustedProxy("X-User", ["proxy.local"])


# -- this machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8420", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8420", 200),
        ("evil.example:8420", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("0.0.0.0", 421),
        ("", 421),
    ],
)
def test_another_name_for_this_machine_is_refused(app: App, host: str, status: int) -> None:
    """A foreign page that lets its own name lead to this machine reads nothing."""
    assert ask(create_app(app, local=True), "GET", f"{API}/me", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("jobs", False)],
)  # fmt: skip
def test_only_loopback_addresses_are_this_machine(host: str, loopback: bool) -> None:
    """A name is not looked up, except localhost."""
    assert is_loopback(host) is loopback


# -- other sites ---------------------------------------------------------------------------------------------------

HOST = {"host": "jobs.example.org"}


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({}, False),
        ({"origin": "https://jobs.example.org"}, False),
        ({"origin": "https://jobs.example.org", "sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "https://admin.example.org", "sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"sec-fetch-site": "same-site", "origin": "https://jobs.example.org"}, True),
        ({"origin": "null"}, True),
        ({"origin": "https://jobs.example.org.evil.example"}, True),
        ({"origin": "https://jobs.example.org:8443"}, True),
        ({"origin": "http://[::1"}, True),
        ({"origin": ""}, True),
        ({"referer": "https://evil.example/page"}, True),
        ({"referer": "https://jobs.example.org/page"}, False),
        ({"referer": "https://admin.example.org/page?a=b"}, False),
        ({"referer": "https://admin.example.org"}, False),
        ({"referer": "https://admin.example.org.evil.example/"}, True),
        ({"referer": "https://evil.example/https://admin.example.org"}, True),
        ({"referer": "http://admin.example.org/page"}, True),
        ({"referer": "http://[::1"}, True),
    ],
)
def test_what_another_site_sends_is_refused(headers: dict[str, str], refused: bool) -> None:
    """Only the page itself, an origin that is allowed, and programs that are no browsers may change something."""
    why = refusal("POST", {**HOST, **headers}, ["https://admin.example.org"])
    assert (why is not None) is refused


@given(st.text(), st.text(), st.sampled_from(["cross-site", "same-site", ""]))
def test_no_text_in_the_headers_breaks_the_rule(origin: str, host: str, site: str) -> None:
    """Any headers have an answer, reading is never refused, and a request that says it is of another site always is."""
    headers = {"origin": origin, "host": host, "sec-fetch-site": site}
    assert refusal("GET", headers) is None
    assert refusal("POST", headers) is not None


def test_a_foreign_page_changes_nothing_and_a_token_needs_no_origin(app: App, tmp_path: Path) -> None:
    """The login that a browser sends along by itself is not used for another site. A token is never sent along."""
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    refused = ask(create_app(app, local=True), "POST", f"{API}/queues/default:pause", headers=foreign)
    assert (refused.status_code, refused.json()["title"]) == (403, "Request of another site")
    file = TokenFile(tmp_path / "tokens.json")
    _, text = file.add("ann", Role.ADMIN)
    login = {"Authorization": f"Bearer {text}", **foreign}
    answer = ask(create_app(app, tokens=file), "POST", f"{API}/queues/nope:pause", headers=login)
    assert answer.status_code == 404
