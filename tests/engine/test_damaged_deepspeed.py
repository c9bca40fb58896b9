"""Checkpoints of Megatron-DeepSpeed that are damaged, hostile or incomplete: refused when the plan is made, in one
sentence with the file's name, soon and in little memory; nothing that they name is run."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from deepspeed_damage import CASES, LAYER, records_of, write_sound
from lightllmd.errors import EXIT_CONFIG, LightllmdError, WeightsInvalid
from lightllmd.probe.model import model_facts
from lightllmd.weights.torch_header import read_torch_header
from lightllmd.weights.torch_pickle import read_state
from long_run import LONG

SECONDS = 10
MEMORY = 300 << 20  # bytes
THROUGH_A_PROCESS = (
    "layer_03-model_00-model_states.pt gone",
    "a zip bomb",
    "calls os.system",
    "pickle: 300,000 opcodes",
    "22,000 records",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def test_there_are_two_hundred_and_more() -> None:
    assert len(CASES) >= 200


def test_the_sound_one_is_taken(folder: Path) -> None:
    facts = model_facts(str(folder), load_way="DS")
    assert (facts.format, facts.checkpoint_dtype, len(facts.files)) == ("deepspeed", "bfloat16", 10)


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint_is_refused_by_its_files_name(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = CASES[case]
    damage(folder)
    monkeypatch.chdir(folder)
    with pytest.raises(LightllmdError) as refused:
        model_facts(str(folder), load_way="DS")
    assert refused.value.exit_code == EXIT_CONFIG
    problems = refused.value.parameters.get("problems") or [{"message": refused.value.message}]
    (message,) = [problem["message"] for problem in problems]
    assert all(word in message for word in (str(folder), *words)), message
    assert message.isprintable()
    assert len(message) < 1000
    assert not (folder / "hacked").exists()


def mutated(body: bytes, first: int, drawn: random.Random) -> bytes:
    """Some bytes behind the first ones changed, gone, put in or repeated."""
    made = bytearray(body)
    for _ in range(drawn.choice([1, 1, 2, 8])):
        at, other = (drawn.randrange(first, len(made) - 8) for _ in range(2))
        change = drawn.choice([b"", drawn.randbytes(1), drawn.randbytes(9), made[other : other + 8]])
        made[at : at + drawn.randrange(9)] = change
    return bytes(made)


def test_a_file_with_any_bytes_is_read_or_refused(sound: Path, tmp_path: Path) -> None:
    drawn, body = random.Random(4), (sound / LAYER).read_bytes()
    told: list[str] = []
    pickle = next(one for name, one in records_of(sound / LAYER).items() if name.endswith("data.pkl"))
    directory = body.index(b"PK\x01\x02")
    for _ in range(20_000 if LONG else 300):
        with suppress(ValueError):
            read_state(mutated(pickle, 0, drawn))
        (tmp_path / LAYER).write_bytes(mutated(body, drawn.choice([0, directory, directory]), drawn))
        try:
            read_torch_header(tmp_path / LAYER)
        except WeightsInvalid as fault:
            told.append(fault.message)
    assert len(told) > 100
    assert all(LAYER in message and message.isprintable() and len(message) < 1000 for message in told)


def ask(folder: Path) -> tuple[subprocess.CompletedProcess[bytes], float, int]:
    """The probe's process, its processor time and its largest memory in bytes."""
    request = json.dumps({"model_dir": str(folder), "load_way": "DS", "device": "cpu"}).encode()
    code = (
        "import resource, sys\n"
        "from lightllmd.probe.__main__ import main\n"
        "code = main()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(used.ru_utime + used.ru_stime, peak.split()[1], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, timeout=60)
    seconds, kilobytes = done.stderr.split()[-2:]
    return done, float(seconds), int(kilobytes) << 10


@pytest.mark.parametrize("case", CASES if LONG else THROUGH_A_PROCESS)
def test_the_probes_process_ends_with_78_soon_and_in_little_memory(folder: Path, case: str) -> None:
    CASES[case][0](folder)
    done, seconds, memory = ask(folder)
    assert done.returncode == EXIT_CONFIG
    assert str(folder) in done.stdout.splitlines()[-1].decode()
    assert seconds < SECONDS
    assert memory < MEMORY
