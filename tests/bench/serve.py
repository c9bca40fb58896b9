"""A server under load, as `lightllmctl bench` measures it, and beside the engine's offline figure.

``python tests/bench/serve.py --start --model DIR [--set KEY=VALUE …] [--offline] [BENCH OPTIONS …]``
``python tests/bench/serve.py --base-url URL [BENCH OPTIONS …]``

`--start` begins a daemon of its own on a free port and ends it afterwards; `--set` are its parameters, in TOML. With
`--offline` the same lengths then run through the offline interface in a process of its own, after the daemon has given
the device back, and the server's output rate is told in percent of that. Bench options are those of ``lightllmctl
bench``; by default 256 requests start at once and none comes later.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from settings import settings as read_settings

from harness import Daemon
from lightllmctl.commands.bench import bench as verb
from lightllmctl.commands.bench import plan
from lightllmctl.figures import summary
from lightllmctl.load import generate
from lightllmctl.render_bench import page
from lightllmctl.workload import draw_ids, draw_lengths

READY = 600.0  # seconds that a daemon may take


def offline(model: str, settings: dict[str, Any], options: dict[str, Any]) -> float:
    """Output tokens per second of the same lengths through `LLM.generate`."""
    import random

    from lightllmd import LLM

    lengths = draw_lengths(options["inputs"], options["outputs"], options["requests"], options["seed"])
    source = random.Random(options["seed"] + 1)
    prompts = [draw_ids(fed, options["vocabulary"], source) for fed, _ in lengths]
    parameters = [{"max_new_tokens": new} for _, new in lengths]
    with LLM(model, **settings) as llm:
        llm.generate(prompt_token_ids=prompts[:2], max_new_tokens=4, ignore_eos=True, detokenize=False, progress=False)
        begun = time.perf_counter()
        llm.generate(
            prompt_token_ids=prompts, parameters=parameters, ignore_eos=True, detokenize=False, progress=False,
            max_running=options["concurrency"],
        )  # fmt: skip
        return sum(new for _, new in lengths) / (time.perf_counter() - begun)


def flags(settings: dict[str, Any]) -> list[str]:
    """For the daemon's command line."""
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{key}={str(value).lower()}")
        else:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--model", help="with --start")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--offline-only", action="store_true", help=argparse.SUPPRESS)
    given, words = parser.parse_known_args()
    try:
        options = dict(verb.make_context("bench", words).params)
    except click.ClickException as wrong:
        parser.error(wrong.format_message())
    slo, processes, _, url = (options.pop(name) for name in ("slo", "processes", "as_json", "base_url"))
    settings = read_settings(given.set)
    if given.offline_only:
        # [http] and the like are the daemon's own.
        keys = {key: value for key, value in settings.items() if "." not in key.removeprefix("engine.")}
        keys = {key.removeprefix("engine."): value for key, value in keys.items()}
        print(json.dumps(offline(given.model, keys, options)))
        return
    with ExitStack() as stack:
        if given.start:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
            daemon = Daemon(folder, "--model_dir", given.model, *flags(settings), fake=False)
            stack.enter_context(daemon)
            url = daemon.url
        elif not url:
            parser.error("--start or --base-url is needed")
        load = plan(url, **options)
        generate(plan(url, **{**options, "requests": min(8, options["requests"])}))  # warm
        report = summary(generate(load, processes), slo)
    click.echo(page(report).plain)
    told = {"work": "serve", "url": url, "settings": settings, **report}
    if report["itl"]:
        told["itl_p99_over_p50"] = report["itl"]["p99"] / report["itl"]["p50"] if report["itl"]["p50"] else None
        click.echo(f"p99 ITL is {told['itl_p99_over_p50'] or float('nan'):.2f} times the median")
    if given.offline and given.start:
        command = [sys.executable, __file__, *sys.argv[1:], "--offline-only"]
        rate = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split(b"\n")[-2])
        told |= {
            "offline_tokens_per_second": rate,
            "percent_of_offline": 100 * report["output_tokens_per_second"] / rate,
        }
        click.echo(f"{told['percent_of_offline']:.1f} % of the offline {rate:,.0f} tokens/s")
    click.echo(f"RESULT {json.dumps(told)}")


if __name__ == "__main__":
    main()
