"""The verb that measures a server under load: bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import click

from lightllmctl.commands.options import LONGEST, Number, json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd.errors import CTL_DONE, CTL_FAILED

if TYPE_CHECKING:
    from lightllmctl.load import Share

MOST_REQUESTS, MOST_PROMPT_TOKENS = 1_000_000, 200_000_000  # all are made before the first is sent
MOST_IDS, USUAL_IDS = 2**31 - 1, 10_000  # of a vocabulary; the usual one has more
ROUTES = {"completions": "/v1/completions", "native": "/generate_stream"}
UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listening addresses that no client can connect to


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A click callback out of a parser that raises ValueError."""

    def callback(_: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param=parameter) from None

    return callback


def _inputs(text: str) -> Any:
    from lightllmctl.workload import SHAREGPT_INPUT, parse_lengths

    return parse_lengths(text, SHAREGPT_INPUT)


def _outputs(text: str) -> Any:
    from lightllmctl.workload import SHAREGPT_OUTPUT, parse_lengths

    return parse_lengths(text, SHAREGPT_OUTPUT)


def _slo(text: str) -> dict[str, float]:
    from lightllmctl.figures import parse_slo

    return parse_slo(text)


@click.command()
@click.option("--base-url", help="http(s)://HOST:PORT of any OpenAI-compatible server. Default: the daemon's own.")
@click.option(
    "--api-key",
    envvar="LIGHTLLMD_API_KEY",
    help="Sent as 'Authorization: Bearer KEY'. Better in $LIGHTLLMD_API_KEY, as others may read a command line.",
)
@click.option("--route", type=click.Choice(list(ROUTES)), default="completions", show_default=True)
@click.option("--model", help="Name of the model in requests. Default: the first of /v1/models.")
@click.option("--requests", type=click.IntRange(1, MOST_REQUESTS), default=256, show_default=True)
@click.option(
    "--concurrency", type=click.IntRange(1, MOST_REQUESTS), help="Requests at a time. Default: all, unless --rate."
)
@click.option("--rate", type=Number(0.001, 1e6), help="Poisson arrivals per second instead.")
@click.option("--input", "inputs", default="100:1024", show_default=True, callback=_parsed(_inputs),
              help="Prompt tokens: LEAST:MOST, N or sharegpt.")  # fmt: skip
@click.option("--output", "outputs", default="100:1024", show_default=True, callback=_parsed(_outputs),
              help="New tokens, likewise.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--prompt", type=click.Choice(["ids", "numbers", "words"]),
              help="Token ids; ids in decimal, for models without a tokenizer; English words, about one token each. "
              "Default: ids, words on the native route.")  # fmt: skip
@click.option("--vocabulary", type=click.IntRange(1, MOST_IDS),
              help="Ids are drawn below this. Default: what /v1/models says of the model, else 10000.")  # fmt: skip
@click.option("--temperature", type=Number(0, 100), default=0.0, show_default=True)
@click.option("--eos/--ignore-eos", "eos", default=False, help="May a generation end early?  [default: ignore-eos]")
@click.option("--slo", metavar="ttft=S,tpot=S,latency=S", callback=_parsed(_slo),
              help="Seconds; counts the requests that keep to all of them.")  # fmt: skip
@click.option("--timeout", type=Number(0.001, LONGEST), default=600.0, show_default=True)
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True,
              help="Processes that generate the load; one reads about 50,000 tokens/s.")  # fmt: skip
@json_option
@pass_context
def bench(
    context: CommandContext, as_json: bool, base_url: str | None, processes: int, slo: Any, **options: Any
) -> int:
    """Measure a server under load: TTFT, TPOT, ITL, throughput, goodput.

    Closed loop with --concurrency, open loop with --rate. Exit code: 0 if any request was answered, else 1.
    """
    if options["rate"] is not None and options["concurrency"] is not None:
        raise click.UsageError("--rate and --concurrency exclude each other")
    if options["route"] == "native" and options["prompt"] == "ids":
        raise click.UsageError("the native route takes text: --prompt words or numbers")
    from lightllmctl.figures import summary
    from lightllmctl.load import generate

    url = base_url or _own_url(context)
    report = summary(generate(plan(url, **options), processes), slo)
    if as_json:
        context.echo_json({"api": 1, "url": url, **report})
    else:
        from lightllmctl.render_bench import page

        context.console.print(page(report))
    return CTL_DONE if report["ok"] else CTL_FAILED


def _own_url(context: CommandContext) -> str:
    """Where the daemon listens."""
    listeners = context.client.get("/v1/status").get("listeners") or []
    urls = [str(one) for one in listeners if str(one).startswith("http")]
    if not urls:
        raise click.UsageError("the daemon has no listener on TCP; --base-url says where to send requests")
    parts = _split(urls[0])
    host = UNSPECIFIED.get(parts.hostname or "", parts.hostname or "127.0.0.1")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{parts.port}"


def plan(
    url: str,
    *,
    api_key: str | None = None,
    route: str = "completions",
    model: str | None = None,
    requests: int,
    concurrency: int | None = None,
    rate: float | None = None,
    inputs: Any,
    outputs: Any,
    seed: int = 0,
    prompt: str | None = None,
    vocabulary: int | None = None,
    temperature: float = 0.0,
    eos: bool = False,
    timeout: float = 600.0,
) -> Share:
    """The whole load. The prompts' seed is another than the lengths', so that longer outputs change no prompt."""
    from lightllmctl.load import Planned, Share
    from lightllmctl.workload import draw_arrivals, draw_lengths, prompt_maker

    parts = _split(url)
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise click.UsageError("--api-key has a character that no header takes")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    prompt = prompt or ("words" if route == "native" else "ids")
    lengths = draw_lengths(inputs, outputs, requests, seed)
    if (tokens := sum(fed for fed, _ in lengths)) > MOST_PROMPT_TOKENS:
        raise click.UsageError(f"these prompts have {tokens:,} tokens together: at most {MOST_PROMPT_TOKENS:,}")
    card: dict[str, Any] = {}
    if route == "completions" and model is None:
        card = _model_card(url, headers, None)
        model = str(card["id"])
    elif vocabulary is None and prompt != "words":
        card = _card_if_any(url, headers, model)
    make = prompt_maker(prompt, vocabulary or _vocabulary(card), seed + 1)
    due = draw_arrivals(rate, requests, seed + 2) if rate else [0.0] * requests
    body = _native_body if route == "native" else _completion_body
    planned = [
        Planned(json.dumps(body(make(fed), asked, temperature, eos, model)).encode(), asked, at)
        for (fed, asked), at in zip(lengths, due, strict=True)
    ]
    return Share(
        host=parts.hostname or "",  # there is one, see `_split`
        port=parts.port or (443 if parts.scheme == "https" else 80),
        tls=parts.scheme == "https",
        path=parts.path.rstrip("/").removesuffix("/v1") + ROUTES[route],
        headers=headers,
        planned=planned,
        concurrency=0 if rate else concurrency or requests,
        timeout=timeout,
    )


def _completion_body(prompt: Any, asked: int, temperature: float, eos: bool, model: str | None) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": asked, "temperature": temperature, "stream": True}
    # ignore_eos is an extension that not every server knows, so it is sent only when it is wanted.
    return body | {"stream_options": {"include_usage": True}} | ({} if eos else {"ignore_eos": True})


def _native_body(prompt: Any, asked: int, temperature: float, eos: bool, _: str | None) -> dict[str, Any]:
    parameters = {"max_new_tokens": asked, "ignore_eos": not eos, "do_sample": temperature > 0}
    return {"inputs": prompt, "parameters": parameters | ({"temperature": temperature} if temperature else {})}


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            parts.hostname.encode("idna")
            return parts
    except ValueError:  # a port that is no number, brackets that don't match, a name that can't be one
        pass
    raise click.UsageError(f"{url!r} is no http(s)://HOST:PORT")


def _vocabulary(card: dict[str, Any]) -> int:
    size = card.get("vocab_size")
    return size if type(size) is int and 1 <= size <= MOST_IDS else USUAL_IDS


def _card_if_any(url: str, headers: dict[str, str], model: str | None) -> dict[str, Any]:
    """Not every server has /v1/models, or lists what it answers to."""
    from lightllmd.errors import BadAnswer

    try:
        return _model_card(url, headers, model)
    except BadAnswer:
        return {}


def _model_card(url: str, headers: dict[str, str], model: str | None) -> dict[str, Any]:
    """What /v1/models says of `model`; None: of the first. Raises DaemonNotRunning, BadAnswer."""
    import httpx

    from lightllmd.errors import BadAnswer, DaemonNotRunning

    place = url.rstrip("/").removesuffix("/v1") + "/v1/models"
    try:
        answer = httpx.get(place, headers=headers, timeout=30)
        cards = answer.raise_for_status().json()["data"]
        named = [dict(card) for card in cards if model in (None, card["id"])]
        return named[0]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise BadAnswer(f"{place} names no model ({error}); --model does") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DaemonNotRunning(f"{place}: {error}") from None


COMMANDS = (bench,)
