"""`lightllmctl bench`: its arithmetic, its reading of answers, and real loads against a real front end."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from bench.roofline import Card, Roofline
from harness import Daemon
from lightllmctl.__main__ import main
from lightllmctl.answer import MalformedAnswer, Record, StreamAnswer
from lightllmctl.commands.bench import plan
from lightllmctl.figures import parse_slo, quantile, summary
from lightllmctl.load import Planned, Share, generate, split
from lightllmctl.workload import (
    SHAREGPT_INPUT,
    SHAREGPT_OUTPUT,
    Lengths,
    draw_arrivals,
    draw_lengths,
    parse_lengths,
    prompt_maker,
)

# --- figures ------------------------------------------------------------------------------------------------------


def record(start: float, *times: float, end: float | None = None, tokens: int | None = None, **more: Any) -> Record:
    count = len(times) if tokens is None else tokens
    return Record(asked=count, start=start, end=end or times[-1], times=list(times), tokens=count, **more)


def test_figures_are_those_of_the_records() -> None:
    records = [
        record(0.0, 1.0, 1.1, 1.3, prompt_tokens=10),  # ttft 1, tpot 0.15, gaps 0.1 and 0.2
        record(1.0, 1.5, 2.5, end=2.6, tokens=5, prompt_tokens=20),  # ttft 0.5, tpot 0.25, a gap of 1
        record(2.0, 2.25),  # one token: no tpot
        record(3.0, end=4.0, failure="http 429", detail="full"),
        record(3.0, end=3.5),  # complete, without a token
    ]
    report = summary(records, {"ttft": 0.6, "tpot": 0.2})
    assert (report["requests"], report["ok"]) == (5, 3)
    assert report["failures"] == {"http 429": 1, "no token": 1}
    assert report["failure_details"] == {"http 429": "full"}
    assert report["duration"] == 4.0
    assert (report["input_tokens"], report["output_tokens"]) == (30, 9)
    assert report["output_tokens_per_second"] == 9 / 4
    assert report["requests_per_second"] == 3 / 4
    assert report["ttft"] == pytest.approx({"mean": 1.75 / 3, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0})
    assert report["tpot"]["mean"] == pytest.approx(0.2)
    assert report["itl"] == pytest.approx({"mean": 1.3 / 3, "p50": 0.2, "p90": 0.84, "p99": 0.984, "max": 1.0})
    assert report["latency"]["max"] == pytest.approx(1.6)
    # The first is late, the second slow; what has one token has no time per token to be slow at.
    assert report["goodput"]["met"] == 1
    assert report["goodput"]["share"] == 0.2
    assert report["goodput"]["requests_per_second"] == 0.25


def test_nothing_good_has_no_figures() -> None:
    report = summary([record(0.0, end=1.0, failure="connect")])
    assert report["ttft"] is report["itl"] is None
    assert report["output_tokens_per_second"] == 0


def test_quantiles_lie_between_neighbours() -> None:
    assert [quantile([1.0, 2.0, 4.0], share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert quantile([7.0], 0.99) == 7.0


def test_slo_and_lengths_are_parsed_or_refused_by_name() -> None:
    assert parse_slo("ttft=1,tpot=0.05") == {"ttft": 1.0, "tpot": 0.05}
    for text in ("ttft", "tttf=1", "ttft=0", "ttft=x"):
        with pytest.raises(ValueError, match=text):
            parse_slo(text)
    assert parse_lengths("100:1024", SHAREGPT_INPUT) == Lengths(100, 1024)
    assert parse_lengths("7", SHAREGPT_INPUT) == Lengths(7, 7)
    assert parse_lengths("sharegpt", SHAREGPT_INPUT) is SHAREGPT_INPUT
    for text in ("", "a", "5:2", "0:3", "1:", "-1"):
        with pytest.raises(ValueError, match=f"'{text}'"):
            parse_lengths(text, SHAREGPT_INPUT)


# --- workloads ------------------------------------------------------------------------------------------------------


def test_lengths_are_the_documented_draws() -> None:
    source = random.Random(0)
    inputs = [source.randint(100, 1024) for _ in range(256)]
    outputs = [source.randint(100, 1024) for _ in range(256)]
    uniform = Lengths(100, 1024)
    assert draw_lengths(uniform, uniform, 256, 0) == list(zip(inputs, outputs, strict=True))
    sharegpt = draw_lengths(SHAREGPT_INPUT, SHAREGPT_OUTPUT, 1000, 1)
    assert (sum(fed for fed, _ in sharegpt), sum(new for _, new in sharegpt)) == (222_526, 206_536)


def test_prompts_have_their_lengths_and_seeds() -> None:
    for kind in ("ids", "numbers", "words"):
        made, again, other = (prompt_maker(kind, 50, seed)(30) for seed in (1, 1, 2))
        assert made == again != other
        assert len(made if isinstance(made, list) else made.split()) == 30


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = draw_arrivals(50.0, 5000, 3)
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(100, rel=0.1)


def test_a_split_load_is_the_whole_load() -> None:
    share = Share("h", 1, False, "/", {}, [Planned(b"", n) for n in range(11)], concurrency=5, timeout=1.0)
    parts = list(split(share, 3))
    assert sorted(planned.asked for part in parts for planned in part.planned) == list(range(11))
    assert [part.concurrency for part in parts] == [2, 2, 1]


def test_limits_are_those_that_were_worked_out_by_hand() -> None:
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    llama |= {"model_type": "llama", "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256}
    limits = Roofline.of(llama, 2, Card("H100", 2.97e12, 794e12))
    assert [round(1e3 * limits.decode(batch, 576), 1) for batch in (1, 8, 32, 128, 256)] == [5.1, 5.3, 5.9, 8.3, 11.6]
    assert [round(1e3 * limits.decode(batch, 4160), 1) for batch in (16, 64)] == [8.0, 16.8]
    assert 1e3 * limits.prefill([2048]) == pytest.approx(37.4, abs=0.1)
    assert 1e3 * limits.prefill([8192]) == pytest.approx(166, abs=0.5)
    assert 32768 / limits.prefill([2048] * 16) == pytest.approx(54_800, rel=0.002)
    uniform = draw_lengths(Lengths(100, 1024), Lengths(100, 1024), 256, 0)
    assert sum(new for _, new in uniform) / limits.mix(uniform, 256) == pytest.approx(10_480, rel=0.02)
    sharegpt = draw_lengths(SHAREGPT_INPUT, SHAREGPT_OUTPUT, 1000, 1)
    assert 1000 / limits.mix(sharegpt, 256) == pytest.approx(65, rel=0.02)
    assert 1000 / limits.mix(sharegpt, 1000) == pytest.approx(75, rel=0.025)


# --- answers --------------------------------------------------------------------------------------------------------


def chunk(text: str) -> bytes:
    data = text.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
OPENAI = HEAD + b"".join(
    chunk(text)
    for text in (
        ": held\n\n",
        'data: {"choices":[{"index":0,"text":"a","finish_reason":null}],"usage":null}\n\n',
        'data: {"choices":[{"index":0,"text":"b","finish_reason":null}]}\n\ndata: {"choices":[{"text":"c',
        '","finish_reason":"length"}]}\r\n\r\n',
        'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\ndata: [DONE]\n\n',
    )
)
NATIVE = HEAD + b"".join(
    chunk(f'data:{{"token":{{"id":1,"prompt_tokens":7}},"finished":{done},"finish_reason":{reason}}}\n\n')
    for done, reason in (("false", "null"), ("true", '"stop"'))
)


def fed(data: bytes, *sizes: int) -> StreamAnswer:
    """The answer after the data came in pieces of these sizes, in turn, and in the order of the clock's seconds."""
    answer, position, now = StreamAnswer(Record(asked=4, start=0.0)), 0, 0.0
    while position < len(data):
        size = sizes[int(now) % len(sizes)]
        now += 1
        assert answer.feed(data[position : position + size], now) == (position + size >= len(data))
        position += size
    return answer


@pytest.mark.parametrize("sizes", [(1,), (3, 50), (1 << 20,)])
def test_a_stream_is_read_alike_however_it_is_cut(sizes: tuple[int, ...]) -> None:
    answer = fed(OPENAI + b"0\r\n\r\n", *sizes)
    assert (answer.record.failure, answer.record.tokens, answer.record.prompt_tokens) == ("", 4, 9)
    assert len(answer.record.times) == 3
    assert answer.reusable
    answer = fed(NATIVE + b"0\r\n\r\n", *sizes)
    assert (answer.record.failure, answer.record.tokens, answer.record.prompt_tokens) == ("", 2, 7)
    assert answer.record.end >= answer.record.times[-1] >= answer.record.times[0] > 0


def test_failures_have_kinds_and_details() -> None:
    refusal = b'{"error":{"message":"the queue is full","code":null}}'
    answer = fed(b"HTTP/1.1 429 Too Many\r\ncontent-length: %d\r\n\r\n%b" % (len(refusal), refusal), 7)
    assert (answer.record.failure, answer.record.detail, answer.reusable) == ("http 429", "the queue is full", True)
    answer = fed(NATIVE.replace(b'"stop"', b"null  ") + b"0\r\n\r\n", 40)
    assert answer.record.failure == "unfinished"
    answer = fed(HEAD + chunk('data:{"message":"died","status":500}\n\n') + b"0\r\n\r\n", 30)
    assert (answer.record.failure, answer.record.detail) == ("error in the stream", "died")
    answer = StreamAnswer(Record(asked=4, start=0.0))
    assert not answer.feed(OPENAI, 1.0)
    answer.closed(2.0)
    assert (answer.record.failure, answer.record.end) == ("connection lost", 2.0)
    for wrong in (b"SSH-2.0-x\r\n\r\n", HEAD + b"zz\r\n", HEAD + chunk("data: nonsense\n\n")):
        with pytest.raises(MalformedAnswer):
            StreamAnswer(Record(asked=4, start=0.0)).feed(wrong, 1.0)


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    answer = StreamAnswer(Record(asked=1, start=0.0))
    body = b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
    assert not answer.feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\n" + body, 1.0)
    answer.closed(2.0)
    assert (answer.record.failure, answer.record.tokens, answer.reusable) == ("", 1, False)


# --- loads ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ["--engine.fake.tokens_per_second", "400", "--max_total_token_num", "100000"]
    with Daemon(tmp_path_factory.mktemp("bench"), *flags) as daemon:
        yield daemon


def bench(server: Daemon, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["--socket", str(server.control), "bench", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("route", ["completions", "native"])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_closed_loop_counts_every_token(
    server: Daemon, capsys: pytest.CaptureFixture[str], route: str, processes: str
) -> None:
    words = ["--route", route, "--processes", processes, "--requests", "12", "--concurrency", "4"]
    code, report = bench(server, capsys, *words, "--input", "5:9", "--output", "3:6", "--slo", "latency=100")
    lengths = draw_lengths(Lengths(5, 9), Lengths(3, 6), 12, 0)
    assert (code, report["ok"], report["failures"]) == (0, 12, {})
    assert report["output_tokens"] == sum(new for _, new in lengths)
    if route == "completions":  # text has as many tokens as the server's tokenizer finds in it
        assert report["input_tokens"] == sum(fed for fed, _ in lengths)
    assert report["goodput"]["share"] == 1
    assert 0 < report["ttft"]["p50"] <= report["latency"]["max"] <= report["duration"]


def test_poisson_arrivals_come_at_their_times(server: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = bench(server, capsys, "--requests", "20", "--rate", "40", "--input", "5", "--output", "2")
    assert (code, report["ok"]) == (0, 20)
    assert report["duration"] >= draw_arrivals(40, 20, 2)[-1]


def test_refusals_are_counted_by_kind(server: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = bench(server, capsys, "--requests", "3", "--input", "5", "--output", "5000")
    assert (code, report["ok"], report["failures"]) == (1, 0, {"http 400": 3})
    assert "more than max_req_total_len" in report["failure_details"]["http 400"]


def test_people_get_a_table(server: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base-url", server.url, "--requests", "3", "--input", "5", "--output", "4"]
    assert main(["bench", *words, "--slo", "ttft=50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "requests  3 of 3 ok"
    assert [line.split()[0] for line in lines if line.startswith(("TTFT", "TPOT", "ITL", "latency"))] == [
        "TTFT", "TPOT", "ITL", "latency",
    ]  # fmt: skip
    assert "100.0% of all (ttft <= 50 s)" in next(line for line in lines if line.startswith("goodput"))


@pytest.mark.parametrize(
    ("answer", "below"),
    [
        ('{"data":[{"id":"other","vocab_size":9},{"id":"m","vocab_size":7}]}', 7),
        ('{"data":[{"id":"m"}]}', 10_000),  # as other servers say it
        ('{"data":[{"id":"m","vocab_size":-3}]}', 10_000),
        ('{"data":[]}', 10_000),
        ("no JSON", 10_000),
    ],
)
def test_ids_are_drawn_from_the_vocabulary_that_the_server_tells(
    monkeypatch: pytest.MonkeyPatch, answer: str, below: int
) -> None:
    def get(url: str, **_: Any) -> httpx.Response:
        return httpx.Response(200, text=answer, request=httpx.Request("GET", url))

    def ids(vocabulary: int | None = None) -> list[int]:
        lengths = Lengths(3000, 3000)
        share = plan("http://h:1/v1", model="m", requests=1, inputs=lengths, outputs=lengths, vocabulary=vocabulary)
        return json.loads(share.planned[0].body)["prompt"]

    monkeypatch.setattr(httpx, "get", get)
    assert below * 0.9 < max(ids()) + 1 <= below
    assert max(ids(99)) == 98


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rate", "1", "--concurrency", "1"], "--rate and --concurrency exclude each other"),
        (["--route", "native", "--prompt", "ids"], "the native route takes text"),
        (["--input", "9:1"], "1 <= LEAST <= MOST"),
        (["--slo", "tft=1"], "ttft, tpot, latency"),
        (["--base-url", "localhost:8000", "--model", "m"], "is no http(s)://HOST:PORT"),
        (["--base-url", "http://[::1", "--model", "m"], "is no http(s)://HOST:PORT"),
        (["--base-url", "http://h:99999", "--model", "m"], "is no http(s)://HOST:PORT"),
        (["--base-url", "http://h", "--model", "m", "--api-key", "é"], "no header takes"),
        (["--base-url", "http://h", "--model", "m", "--requests", "1000000", "--input", "2000"], "at most 200,000,000"),
        (["--rate", "nan"], "no finite number"),
        (["--timeout", "inf"], "is not in the range"),
    ],
)
def test_wrong_options_are_usage_errors(ctl: Any, words: list[str], said: str) -> None:
    result = ctl("bench", *words)
    assert result.code == 2
    assert said in result.err


def test_nobody_listening_is_told(ctl: Any, short_path: Path) -> None:
    assert ctl("bench").code == 3  # no daemon to ask where it listens
    share = Share("127.0.0.1", 9, False, "/", {}, [Planned(b"{}", 1)], concurrency=1, timeout=5.0)
    (only,) = generate(share)
    assert only.failure == "connect"
    assert only.end >= only.start


def test_a_connection_that_the_server_closed_meanwhile_costs_no_request() -> None:
    """Each connection answers once, says that it may be kept, and is closed when the next request comes."""
    answered: list[bytes] = []
    ports: list[int] = []
    ready, done = threading.Event(), threading.Event()

    async def serve() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answered.append(await reader.readuntil(b"{}"))
            writer.write(OPENAI + b"0\r\n\r\n")
            await writer.drain()
            await reader.read(1)
            writer.transport.abort()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await asyncio.to_thread(done.wait, 60)
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        planned = [Planned(b"{}", 4) for _ in range(3)]
        records = generate(Share("127.0.0.1", ports[0], False, "/", {}, planned, concurrency=1, timeout=20.0))
    finally:
        done.set()
        thread.join(30)
    assert [one.failure for one in records] == ["", "", ""]
    assert len(answered) == 3
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(records), type=list[Record]) == records
