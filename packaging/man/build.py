#!/usr/bin/env python3
"""Writes the manual pages lightllmd(8), lightllmctl(1) and lightllmd.toml(5) into a directory.

    python packaging/man/build.py DIRECTORY

Settings, flags, verbs and exit codes come from where the programs have them; only what holds them together is written
here. The date is that of $SOURCE_DATE_EPOCH, so that one commit gives one text.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from roff import Page, bold, escape, italic, prose  # noqa: E402

from lightllmctl.__main__ import cli as ctl  # noqa: E402
from lightllmd import __version__, errors  # noqa: E402
from lightllmd.config import cli, features, models, push, reference  # noqa: E402
from lightllmd.config.parameters import Config  # noqa: E402
from lightllmd.config.setting import Field, tables  # noqa: E402

CONTROL_SOCKET = "/run/lightllmd/control.sock"

RELOAD = {
    "live": "the new value is in force at once",
    "front end": "the processes that answer HTTP are replaced one by one on the same listening sockets",
    "restart": "a reload refuses a new value: it takes a new lightllmd",
    "engine": "a new engine is made ready, then takes the place of the old one; requests in flight lose nothing",
}


def page(name: str, section: int, manual: str, summary: str) -> Page:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    made = Page(name, section, time.strftime("%Y-%m-%d", time.gmtime(epoch)), f"lightllmd {__version__}", manual)
    made.section("NAME")
    made.paragraph(f"{escape(name)} \\- {escape(summary)}")
    return made


def see_also(made: Page, *others: str) -> None:
    made.section("SEE ALSO")
    made.paragraph(",\n".join(re.sub(r"(.+)(\(\d\))", lambda found: bold(found[1]) + found[2], one) for one in others))


# --- lightllmd(8) ---------------------------------------------------------------------------------------------------


def daemon() -> str:
    made = page("lightllmd", 8, "System Administration", "supervised daemon that serves large language models")
    made.section("SYNOPSIS")
    made.paragraph(
        f"{bold('lightllmd')} [{bold('--config')} {italic('FILE')}] [{bold('--')}{italic('setting value')}] ..."
    )
    made.paragraph(f"{bold('lightllmd --check')} [{italic('FILE')}] [{bold('--offline')}]")
    made.section("DESCRIPTION")
    for text in (
        "lightllmd reads one TOML file, keeps a large language model serving over HTTP (LightLLM's native API and "
        "OpenAI's), restarts what dies, and loses no accepted request when the engine dies: the requests in flight are "
        "held and go on, from the token they had reached, on the process that takes its place. When a process that "
        "answers HTTP dies, the connections that it was answering break off and their clients have to ask again; new "
        "connections wait for the next one.",
        "It listens where `host` and `port` say, and for lightllmctl(1) on a control socket. Its log goes to standard "
        "error, which is the journal under systemd(1).",
        "The environment that the Debian package makes is `/usr/lib/lightllmd/venv`; README.Debian tells what it is "
        "made of and how to add a Python package to it.",
    ):
        made.paragraph(prose(text))
    made.section("OPTIONS")
    for tag, said in _daemon_actions():
        made.item(tag, prose(said))
    made.paragraph(
        prose(
            "Every setting of lightllmd.toml(5) is a flag, too, and overrides the file: `--port 9000`, "
            "`--http.workers 2`, `--eos_id 2 7`. A switch takes `=true` or `=false` and is on without them. "
            "`lightllmd --help` lists all of them. The environment overrides nothing."
        )
    )
    made.section("SIGNALS")
    made.items(
        (
            ("SIGHUP", "Reads the configuration again, as `lightllmctl reload` does."),
            (
                "SIGTERM, SIGINT",
                "Refuses new requests, lets those in flight finish for at most `drain_timeout` of [supervisor], and "
                "ends. A second one ends the requests at once, a third one kills what is left.",
            ),
            ("SIGQUIT", "Ends the requests at once, and the daemon."),
            (
                "SIGABRT",
                "Writes what every thread does to standard error, and ends. systemd's watchdog sends it to a daemon "
                "that hangs.",
            ),
            (
                "SIGKILL",
                "Ends the daemon and all of its workers. Where systemd keeps the listening sockets, the daemon that is "
                "started next answers the connections that wait.",
            ),
            (
                "SIGUSR1, SIGUSR2, SIGALRM, SIGPIPE, SIGIO, SIGPROF, SIGVTALRM, SIGPWR, SIGSTKFLT, real-time signals",
                "Ignored by the daemon and its workers. The workers ignore SIGHUP, SIGINT and SIGQUIT, too.",
            ),
        )
    )
    made.section("EXIT STATUS")
    made.items((str(code), text) for code, text in _daemon_exit_codes().items())
    made.section("ENVIRONMENT")
    made.items(
        (
            ("NOTIFY_SOCKET, WATCHDOG_USEC", "Set by systemd: see sd_notify(3)."),
            ("LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID", "Listening sockets that systemd passes: see systemd.socket(5)."),
            ("WATCHDOG_PID, JOURNAL_STREAM", "Set by systemd: whether the watchdog is ours, and stderr the journal's."),
            (
                "RUNTIME_DIRECTORY",
                "Where the control socket and the workers' sockets are, if [supervisor] `control_socket` names no "
                "other place. Without it: /run/lightllmd for root.",
            ),
            (
                "XDG_RUNTIME_DIR",
                "Where they are for other users, in a directory `lightllmd`; /tmp/lightllmd-UID where it is not set.",
            ),
            (
                "STATE_DIRECTORY",
                "Where crash reports are kept, in a directory `crashes`. Without it the daemon knows those of its own "
                "life only.",
            ),
            (
                "CACHE_DIRECTORY",
                "Where compiled GPU kernels are kept; without it in `lightllmd` below XDG_CACHE_HOME, else `~/.cache`.",
            ),
            ("TRITON_CACHE_DIR", "Where they are kept instead, whatever the others say."),
            ("CUDA_VISIBLE_DEVICES", "Which GPUs the engine may use."),
            ("CUDA_DEVICE_ORDER", "Set to PCI_BUS_ID for all workers, so that each numbers GPUs alike."),
            (
                ", ".join((push.USER, push.PASSWORD)),
                "With `enable_monitor_auth`: user and password for the gateway of metrics. The password "
                "is left out of the environment of all workers.",
            ),
            ("http_proxy, no_proxy", "Whether metrics are pushed to `metric_gateway` through a proxy."),
        )
    )
    made.section("FILES")
    made.items(
        (
            (cli.DEFAULT_FILE, "The configuration: see lightllmd.toml(5)."),
            (CONTROL_SOCKET, "The control socket of the system's daemon. Root and the group lightllmd may use it."),
            ("/var/lib/lightllmd, /var/cache/lightllmd", "State and cache of the system's daemon."),
        )
    )
    made.section("EXAMPLES")
    made.paragraph(prose("What is wrong with the configuration, one problem a line:"))
    made.code(f"lightllmd --check {cli.DEFAULT_FILE}")
    made.paragraph(prose("Serve a model without any file:"))
    made.code("lightllmd --model_dir /srv/models/llama-3.1-8b-instruct --port 9000")
    made.paragraph(prose("The service of the Debian package:"))
    made.code("systemctl start lightllmd\nsystemctl reload lightllmd\njournalctl -u lightllmd")
    see_also(made, "lightllmctl(1)", "lightllmd.toml(5)", "systemctl(1)", "journalctl(1)")
    return made.text()


def _daemon_actions() -> Iterator[tuple[str, str]]:
    """The flags that are no settings, as (roff tag, help)."""
    for action in cli.actions():
        tag = ", ".join(bold(flag) for flag in action.option_strings)
        if action.metavar:
            tag += f" {italic(str(action.metavar))}" if action.nargs != "?" else f" [{italic(str(action.metavar))}]"
        yield tag, _sentence(action.help or "")


def _daemon_exit_codes() -> dict[int, str]:
    return {
        errors.EXIT_OK: "It was told to stop; `--check` found nothing wrong.",
        errors.EXIT_FAILED: "Something failed that another start may not meet; the last lines of the log say what.",
        2: "The command line has a flag that does not exist.",
        errors.EXIT_NO_DEVICE: "No usable device.",
        errors.EXIT_SYSTEM: "The system refused something: an address or a control socket that is in use, a directory "
        "that can't be written, standard output that takes nothing.",
        errors.EXIT_TRY_AGAIN: "It may work later: the model or the device could not be read in time.",
        errors.EXIT_CONFIG: "The configuration is wrong, or the model is not one that can be served. systemd does not "
        "restart the service then.",
    }


# --- lightllmctl(1) -------------------------------------------------------------------------------------------------


def control() -> str:
    made = page("lightllmctl", 1, "User Commands", "ask and command the lightllmd daemon")
    made.section("SYNOPSIS")
    made.paragraph(
        f"{bold('lightllmctl')} [{bold('--socket')} {italic('PATH')}] {italic('VERB')} [{italic('ARGUMENT')} ...]"
    )
    made.section("DESCRIPTION")
    about, codes = _split_exit_codes(ctl.help or "")
    for roff in _help_paragraphs(about):
        made.paragraph(roff)
    made.section("OPTIONS")
    context = click.Context(ctl, info_name="lightllmctl", **ctl.context_settings)
    _options(made, ctl, context)
    made.section("VERBS")
    _verbs(made, ctl, context)
    made.section("EXIT STATUS")
    made.items(codes)
    made.section("ENVIRONMENT")
    made.items(
        (
            ("LIGHTLLMD_SOCKET", "The control socket, where `--socket` names none."),
            (
                "XDG_RUNTIME_DIR",
                "Where your own daemon's control socket is looked for, before /tmp/lightllmd-UID and the system's.",
            ),
            ("NO_COLOR", "If set, nothing is coloured. Nothing is on what is not a terminal, either."),
            (
                "LANG, LC_ALL, PYTHONIOENCODING",
                "The encoding of the terminal. Characters that it lacks are written in others; JSON and TOML stay "
                "valid.",
            ),
        )
    )
    made.section("SIGNALS")
    made.items(
        (
            ("SIGINT", "Ends the waiting for a job; the job itself goes on. Exit status 130."),
            (
                "SIGPIPE",
                "A closed pipe ends a verb that only prints, with 0. A job is followed to its end all the same.",
            ),
        )
    )
    made.section("FILES")
    made.items(
        (
            (CONTROL_SOCKET, "The system's daemon."),
            ("$XDG_RUNTIME_DIR/lightllmd/control.sock, /tmp/lightllmd-UID/control.sock", "A user's own daemon."),
        )
    )
    see_also(made, "lightllmd(8)", "lightllmd.toml(5)")
    return made.text()


def _verbs(made: Page, group: click.Group, context: click.Context, prefix: str = "") -> None:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        made.subsection(" ".join([f"{prefix}{name}", *_usage(command, inner)]))
        for roff in _help_paragraphs(command.help or ""):
            made.paragraph(roff)
        _options(made, command, inner)
        if isinstance(command, click.Group):
            _verbs(made, command, inner, f"{prefix}{name} ")


def _split_exit_codes(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A help text without its list of exit codes; and that list as (code, meaning)."""
    kept, codes = [], []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("Exit codes:"):
            listed = " ".join(paragraph.split()).removeprefix("Exit codes:").rstrip(".")
            codes = [(code, _sentence(words)) for code, words in re.findall(r" (\d+) (.*?)(?=, \d|$)", listed)]
        else:
            kept.append(paragraph)
    return "\n\n".join(kept), codes


def _usage(command: click.Command, context: click.Context) -> list[str]:
    return [piece for piece in command.collect_usage_pieces(context) if piece != "[OPTIONS]"]


def _options(made: Page, command: click.Command, context: click.Context) -> None:
    for parameter in command.get_params(context):
        if not isinstance(parameter, click.Option) or parameter.hidden:
            continue
        if "--help" in parameter.opts and context.parent is not None:
            continue  # every verb has it: said once, above
        record = parameter.get_help_record(context)
        if record is None:
            continue
        made.item(", ".join(_flags(record[0])), prose(_sentence(record[1])))


def _flags(written: str) -> Iterator[str]:
    """ "-n, --lines N" as roff: what is typed in bold, what stands for something in italics."""
    for one in written.split(", "):
        flag, _, metavar = one.partition(" ")
        metavar = {"INTEGER": "N", "INTEGER RANGE": "N", "FLOAT": "X", "FLOAT RANGE": "X"}.get(metavar, metavar)
        yield bold(flag) + (f" {italic(metavar)}" if metavar else "")


def _help_paragraphs(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\f")[0].replace("\b\n", "").split("\n\n"):
        yield prose(paragraph)


def _sentence(text: str) -> str:
    text = text.strip()
    if re.match(r"[a-z]+([\s,.;]|$)", text):  # a word, and no name such as model_dir or http://
        text = text[0].upper() + text[1:]
    return text + ("" if not text or text.endswith((".", "]", "?")) else ".")


# --- lightllmd.toml(5) ----------------------------------------------------------------------------------------------


def configuration() -> str:
    made = page("lightllmd.toml", 5, "File Formats", "configuration of the lightllmd daemon")
    made.section("SYNOPSIS")
    made.paragraph(bold(cli.DEFAULT_FILE))
    made.section("DESCRIPTION")
    for text in (
        "A TOML file. The documented LightLLM parameters stand at its top, above the first [table]; the tables hold "
        "what is lightllmd's own. Everything but `model_dir` has a default. A flag of lightllmd(8) overrides the file.",
        "`lightllmd --check` names every fault of a file by line, key, value and bound. `lightllmctl config "
        "--effective` shows what became of the settings, each derived value with its reason. `lightllmd "
        "--print-config` prints a file that has every setting as a comment.",
        "`lightllmctl reload` puts a changed file in force without dropping a request. What that takes is told for "
        "each setting:",
    ):
        made.paragraph(prose(text))
    for name, text in RELOAD.items():
        made.item(bold(name), prose(_sentence(text)))
    table = group = ""
    made.section("PARAMETERS")
    for field in reference.grouped():
        if field.table != table:
            table = field.table
            made.section(f"[{table}]")
            made.paragraph(prose(_sentence(tables(Config)[table])))
        elif field.setting.group and field.setting.group != group:
            group = field.setting.group
            made.subsection(group)
        _setting(made, field)
    _features(made)
    made.section(f"[{models.TABLE}.NAME]")
    made.paragraph(prose(_sentence(models.DOC)))
    made.paragraph(
        prose(f"NAME: {models.NAME_FORM}. What may stand here, with the meaning it has at the top of the file:")
    )
    made.paragraph(",\n".join(bold(field.key) for field in models.allowed()))
    made.section("EXIT STATUS")
    made.paragraph(
        prose(
            f"A file with a fault ends lightllmd(8), also with `--check`, with {errors.EXIT_CONFIG}, and "
            f"lightllmctl(1) `check` and `reload` with {errors.CTL_CONFIG_INVALID}; what ran before a `reload` runs on."
        )
    )
    made.section("EXAMPLES")
    made.code(
        'model_dir = "/srv/models/llama-3.1-8b-instruct"\nhost = "0.0.0.0"\n\n'
        '[http]\napi_keys_file = "/etc/lightllmd/keys.toml"\n\n'
        '[models.small]\nmodel_dir = "/srv/models/qwen3-0.6b"\n'
    )
    see_also(made, "lightllmd(8)", "lightllmctl(1)")
    return made.text()


def _features(made: Page) -> None:
    made.section("FEATURES OF GENERATION")
    made.paragraph(
        prose("Which of them go together: + works, - is refused. The numbers are of the remarks below the table.")
    )
    table = features.table()
    width = max(len(name) for _, name, _ in table.rows) + 3
    lines = [" " * width + "".join(f"{letter:>4}" for letter, _, _ in table.rows[:-1])]
    for letter, name, cells in table.rows:
        marks = (("+" if cell.works else "-") + (str(cell.remark) if cell.remark else "") for cell in cells)
        lines.append(f"{letter}  {name}".ljust(width) + "".join(f"{mark:>4}" for mark in marks))
    made.code("\n".join(lines))
    for number, remark in enumerate(table.remarks, 1):
        made.item(str(number), prose(remark))


def _setting(made: Page, field: Field) -> None:
    value = field.setting.example if field.default in (None, "", []) else reference.toml_value(field.default)
    made.item(
        bold(field.name) + (f" = {italic(value)}" if value else ""),
        prose(field.setting.doc),
        prose(_sentence("; ".join(reference.facts(field)))),
    )


PAGES = {"lightllmd.8": daemon, "lightllmctl.1": control, "lightllmd.toml.5": configuration}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the manual pages of lightllmd.")
    parser.add_argument("directory", type=Path, help="where to; made if it is not there")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (directory / name).write_text(make(), encoding="ascii")


if __name__ == "__main__":
    main()
