"""The page at /: what it tells, to which clients, under which headers; without a browser (tests/page has one)."""

from __future__ import annotations

import asyncio
import re
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec

import lightllmd
from api.frontend_harness import Stack, make_plan, run, stack, until
from lightllmd import __version__
from lightllmd.api.page.files import HEADERS, PageFiles
from lightllmd.api.page.routes import Page
from lightllmd.api.page.view import device_of, duration
from lightllmd.config import keys
from lightllmd.config.plan import ModelFacts, Pooling, Scoring
from lightllmd.ipc import messages
from lightllmd.ipc.messages import Overview, WorkerSeen

HTML = {"Accept": "text/html,application/xhtml+xml"}
HOSTILE = """<script>alert(1)</script>"'&{{7*7}}</title><img src=x onerror=alert(1)>"""


def overview(**told: Any) -> Overview:
    counts = {"in_flight": 1, "held": 3, "ok": 1234, "cancelled": 2, "failed": 0, "resumed": 5}
    workers = [
        WorkerSeen("api-0", "running", "Ready", 0, True),
        WorkerSeen("engine-0", "starting", "Loading weights 42%", 2, False),
    ]
    facts = {"started": time.time() - 7500, "sentence": "Serving it", "tokens_per_second": 38.4, "workers": workers}
    return Overview(**(facts | counts | told))


class Document(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, name: str) -> dict[str, str | None]:
        """The attributes of the element with that id."""
        return next(attributes for _, attributes in self.elements if attributes.get("id") == name)


def test_the_page_tells_over_how_many_processes_a_model_runs():
    plan = make_plan()
    assert device_of(plan) == "cpu, float32"
    assert device_of(msgspec.structs.replace(plan, ranks=4, replicas=2)) == "cpu, float32, tp 4, 2 replicas"


def test_the_page_tells_what_the_worker_knows(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(overview())
            await until(lambda: one.worker.revisions.overview is not None)
            answer = await one.client.get("/", headers=HTML)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            text = Document(answer.text).text
            for told in (
                "fake-model",
                "Ready",
                "Serving it",
                "38.4",
                "0% of 6,000 tokens",
                "cpu, float32",
                "2 h 5 min",
            ):
                assert told in text
            for told in (
                "1,234 answered, 2 cancelled, 5 resumed",
                "Loading weights 42%, restarted 2 times",
                __version__,
            ):
                assert told in text
            state = (await one.client.get("/page/state")).json()
            assert (state["ready"], state["kind"], state["rate"], state["share"]) == (True, "chat", 38.4, 0)
            assert all(value in text for value in state["texts"].values())
            assert [worker["ready"] for worker in state["workers"]] == [True, False]
            head = await one.client.head("/")
            assert (head.status_code, head.content, head.headers["content-length"]) == (
                200,
                b"",
                str(len(answer.content)),
            )

    run(scenario())


def test_health_on_the_page_is_the_one_of_readiness(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for _ in range(2):
                await one.kill()
                page = Document((await one.client.get("/")).text)
                assert page.named("health")["data-ready"] == "false"
                assert (await one.client.get("/readiness")).json()["message"] == "the engine died"
                assert "The engine died" in page.text
                assert "Serving" not in page.text
                await one.up()
                assert Document((await one.client.get("/")).text).named("health")["data-ready"] == "true"

    run(scenario())


def test_every_answer_has_the_strict_headers(tmp_path):
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    for held in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert held in policy

    async def scenario():
        async with stack(tmp_path) as one:
            files = PageFiles()
            for path in ("/", "/page/state", *(f"/page/{files.tag}/{name}" for name in files.names)):
                answer = await one.client.get(path)
                assert answer.status_code == 200
                assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert HEADERS["X-Content-Type-Options"] == "nosniff"
            assert HEADERS["Referrer-Policy"] == "no-referrer"

    run(scenario())


def test_nothing_on_the_page_needs_another_server_or_an_exception_of_the_policy(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            return (await one.client.get("/")).text

    for tag, attributes in Document(run(scenario())).elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", tag
            if name in ("src", "href", "action"):
                assert re.fullmatch(r"#?[a-z][\w/.]*", value or ""), value  # relative: a proxy may put it anywhere
    files = PageFiles()
    for name in files.names:
        text = files.answer(files.tag, name, "").body.decode()
        assert re.findall(r"https?://[^\"' ]*", text) in ([], ["http://www.w3.org/2000/svg"])
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|srcdoc", text), name


def test_names_are_text_whatever_they_hold(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(model=HOSTILE)) as one:
            one.tell(overview(sentence=HOSTILE, workers=[WorkerSeen(HOSTILE, "fatal", HOSTILE, 1, False)]))
            one.tell(messages.Health(False, HOSTILE))
            await until(lambda: one.worker.revisions.overview is not None and not one.healthy)
            answer = await one.client.get("/")
            page = Document(answer.text)
            assert page.text.count(HOSTILE) >= 5  # title, header, health, worker and what it says
            harmless = [tag for tag, _ in page.elements if tag in ("script", "img")]
            assert harmless == ["script", "img"]  # those of the page itself
            assert (await one.client.get("/page/state")).json()["texts"]["model"] == HOSTILE

    run(scenario())


def test_files_are_cached_by_what_they_hold(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            tag = PageFiles().tag
            page = (await one.client.get("/")).text
            assert f'src="page/{tag}/main.js"' in page
            answer = await one.client.get(f"/page/{tag}/main.js")
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
            assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
            for known in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
                again = await one.client.get(f"/page/{tag}/main.js", headers={"If-None-Match": known})
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
            assert (await one.client.get(f"/page/{tag}/main.js", headers={"If-None-Match": '"x"'})).status_code == 200
            older = await one.client.get("/page/0123456789abcdef/main.js")
            assert (older.content, older.headers["cache-control"]) == (answer.content, "no-cache")
            for path in (
                f"/page/{tag}/page.html",
                f"/page/{tag}/none.js",
                f"/page/{tag}/..%2fview.py",
                "/page/main.js",
            ):
                assert (await one.client.get(path)).status_code == 404

    run(scenario())


def test_the_page_can_be_switched_off(tmp_path):
    async def scenario():
        async with stack(tmp_path, page=False) as one:
            assert (await one.client.get("/", headers=HTML)).status_code == 405  # it is generate's, by POST
            for path in ("/page/state", f"/page/{PageFiles().tag}/main.js"):
                answer = await one.client.get(path, headers=HTML)
                assert (answer.status_code, answer.json()) == (404, {"message": f"there is no {path}; see /docs"})

    run(scenario())


def test_without_a_key_the_page_tells_health_alone(tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret\n")
    told = keys.KeyRing(keys.read(str(file)))

    async def scenario():
        async with stack(tmp_path, api_keys_file=str(file)) as one:
            one.tell(overview())
            await until(lambda: one.worker.revisions.overview is not None)
            for headers in (HTML, HTML | {"Authorization": "Bearer secret"}):  # a cache may keep one for all
                page = await one.client.get("/", headers=headers)
                assert page.status_code == 200
                assert Document(page.text).named("health")["data-ready"] == "true"
                for hidden in ("fake-model", __version__, "float32", "6,000", "api-0", "1,234", "Serving it", "38.4"):
                    assert hidden not in page.text
            assert (await one.client.get(f"/page/{PageFiles().tag}/page.css")).status_code == 200
            assert (await one.client.get("/page/state")).status_code == 401
            answer = await one.client.get("/page/state", headers={"Authorization": "Bearer secret"})
            assert answer.json()["texts"]["model"] == "fake-model"
            assert (await one.client.post("/", json={})).status_code == 401
            assert (await one.client.get("/v1/models")).status_code == 401

            one.tell(messages.Keys(keys.encode(keys.KeyRing())))  # keys are live
            await until(lambda: "fake-model" in page_of(one).html().decode())
            assert "fake-model" in (await one.client.get("/", headers=HTML)).text
            one.tell(messages.Keys(keys.encode(told)))
            await until(lambda: "fake-model" not in page_of(one).html().decode())

    run(scenario())


def page_of(one: Any) -> Page:
    """A page of that worker's state and keys."""
    return Page(one.worker.revisions, lambda: one.worker._keys.required, shared=False)


def test_browsers_get_the_page_and_clients_of_tgi_their_answer_from_one_path(tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret\n")
    key = {"Authorization": "Bearer secret"}

    async def scenario():
        async with stack(tmp_path, {"use_tgi_api": True}) as one:
            page = await one.client.get("/", headers=HTML)
            assert "<!doctype html>" in page.text
            assert page.headers["vary"] == "Accept"
            for accepted in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
                answer = await one.client.get("/", headers=accepted)
                assert (answer.status_code, answer.json()) == (200, {"message": "Ok"})
            generated = await one.client.post(
                "/", json={"inputs": "hi", "parameters": {"max_new_tokens": 2}}, headers=HTML
            )
            assert "generated_text" in generated.json()[0]
            await one.kill()
            assert (await one.client.get("/")).status_code == 503
            assert (await one.client.get("/", headers=HTML)).status_code == 200
        async with stack(tmp_path, {"use_tgi_api": True}, api_keys_file=str(file)) as one:
            statuses = [
                (await one.client.request(method, "/", headers=headers)).status_code
                for method, headers in (("GET", HTML), ("HEAD", HTML), ("GET", {}), ("GET", key), ("POST", HTML))
            ]
            assert statuses == [200, 200, 401, 200, 401]

    run(scenario())


def test_a_model_without_answers_has_a_sentence_in_place_of_the_chat(tmp_path):
    async def shown(one: Stack) -> tuple[str, set[str]]:
        page = Document((await one.client.get("/")).text)
        notes = {has["data-for"] for _, has in page.elements if "data-for" in has and "hidden" not in has}
        assert ("The chat needs JavaScript" in page.text) == (not notes)
        return (await one.client.get("/page/state")).json()["kind"], notes

    async def scenario():
        async with stack(tmp_path, plan=make_plan(scoring=Scoring(["LABEL_0"]))) as one:
            assert await shown(one) == ("scores", {"scores"})
        async with stack(tmp_path) as one:
            assert await shown(one) == ("chat", set())
            revision = one.worker.revisions.current
            revision.tokenizer.chat_template = None
            assert await shown(one) == ("text", set())
            facts = ["/m", "safetensors", "qwen3", {}, [], 1, 2, None, 64, [], False, False]
            model = ModelFacts(*facts, pooling=Pooling("last", True))
            revision.plan = msgspec.structs.replace(revision.plan, model=model)
            assert await shown(one) == ("vectors", {"vectors"})

    run(scenario())


def test_an_answer_takes_less_than_five_milliseconds_even_where_everything_changed(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            page, taken = page_of(one), []
            for count in range(50):
                one.worker.revisions.overview = overview(ok=count)
                begun = time.thread_time()
                html = page.html()
                taken.append(time.thread_time() - begun)
                assert f"{count} answered" in html.decode()
            assert sorted(taken)[25] < 0.005
            assert page.html() is page.html()  # nothing changed: nothing is rendered

    run(scenario())


def test_pages_do_not_wait_for_requests_that_run(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()  # it makes no token
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "stream": True}
            async with httpx.AsyncClient(base_url=one.client.base_url) as other:
                sent = [other.build_request("POST", "/v1/chat/completions", json=body) for _ in range(20)]
                streams = [asyncio.ensure_future(other.send(request, stream=True)) for request in sent]
                await engine.submitted(20)
                answers = [await one.client.get("/") for _ in range(20)]
                assert {answer.status_code for answer in answers} == {200}
                for stream in streams:
                    stream.cancel()

    run(scenario())


def test_times_are_told_to_the_minute():
    told = {0: "less than a minute", 59: "less than a minute", 60: "1 min", 3599: "59 min", 3600: "1 h 0 min"}
    assert {seconds: duration(seconds) for seconds in told} == told
    assert duration(90061) == "1 d 1 h"
    assert duration(-5) == "less than a minute"  # the clock was set back


def test_an_installed_package_has_the_files_of_the_page():
    root = Path(lightllmd.__file__).parents[1]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "lightllmd" / "api" / "page"
    packed = {file for pattern in patterns["lightllmd.api.page"] for file in folder.glob(pattern)}
    kept = {file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert kept
    assert kept <= packed


def test_the_document_of_the_api_has_the_page(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            return (await one.client.get("/openapi.json")).json()

    paths = run(scenario())["paths"]
    assert set(paths["/"]) == {"get", "post"}
    assert paths["/"]["get"]["tags"] == paths["/page/state"]["get"]["tags"] == ["page"]
