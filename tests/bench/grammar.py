"""What constrained rows cost a decode step: batches of which none, half and all are held to a JSON schema, in one
engine.

``python tests/bench/grammar.py [--model CONFIG_DIR] [--batches 64] [--contexts 512,4096] [--set KEY=VALUE]``

Random weights in the shape of Llama 3.1 8B, or of another config.json, and a vocabulary of as many made-up tokens as
the model has logits: bytes, words with and without a space before them, digits, JSON's punctuation in the runs that
real vocabularies have. Prompts are random ids; rows are held to an array of objects that can't end before the run does.

A step's time is that of 1 + `new` tokens minus that of 1, over `new`; the kinds of batches take turns, and the best of
each is told, for greedy and for drawn rows. `masks_ms`: per step, in which the host makes masks while the device
computes. `steps`: as many as there are tokens, where no row waits for its own. `pause`: the longest time between two
steps of unconstrained rows while a schema of 20 kB, new to the engine, is compiled beside them as the daemon's engine
does it, and without that.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from settings import settings

from lightllmd import LLM
from lightllmd.engine.grammar_gate import GrammarGate
from lightllmd.engine.grammar_vocabulary import compiler_of
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar, SamplingParams, Submit
from lightllmd.offline_jobs import OfflineJob
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.text_work import without_waiting

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
RESERVED = 256  # tokens at the end of the vocabulary that no text is made of, those that end a generation among them
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "kind": {"enum": ["person", "place", "thing", "idea"]},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "done": {"type": "boolean"},
    },
    "required": ["name", "kind", "count", "ratio", "tags", "done"],
}
ENDLESS = json.dumps({"type": "array", "items": ITEM, "minItems": 2000})
LARGE = json.dumps({"type": "object", "properties": {f"p{i}": ITEM for i in range(55)}, "required": ["p1"]})
KINDS = {"none": 0, "half": 2, "all": 1}  # every so many rows are constrained


# --- the model --------------------------------------------------------------------------------------------------------


def _alphabet() -> list[str]:
    """GPT-2's printable character of each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def words() -> Iterator[bytes]:
    """Without end, and with repetitions."""
    yield from (bytes([byte]) for byte in range(256))
    yield from (str(number).encode() for number in range(1000))
    for run in (
        '{"',
        '":',
        '",',
        '","',
        '":"',
        '": "',
        '"}',
        "},{",
        '["',
        '"]',
        "],",
        "[]",
        "{}",
        ' "',
        " {",
        " [",
        '"\n',
    ):
        yield run.encode()
    for spaces in range(2, 33):
        yield b" " * spaces
        yield b"\n" + b" " * spaces
    source = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "or")]
    while True:
        word = "".join(source.choices(syllables, k=source.choices((1, 2, 3, 4), (2, 5, 4, 2))[0]))
        word = source.choice((word, word, word, word.capitalize(), f"{word},", f'{word}"', "é" + word))
        yield (" " * (source.random() < 0.6) + word).encode()


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level one of `size` tokens."""
    alphabet, vocab = _alphabet(), {}
    for raw in words():
        if len(vocab) == size - RESERVED:
            break
        vocab.setdefault("".join(alphabet[byte] for byte in raw), len(vocab))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    reserved = [{"id": number, "content": f"<|{number}|>"} | flags for number in range(size - RESERVED, size)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": reserved,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


# --- what is run ------------------------------------------------------------------------------------------------------


class Bench:
    """Runs batches in one engine, and clocks what makes masks."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._source = random.Random(0)
        self.mask_seconds, self.steps = 0.0, 0
        llm._scheduler.late_masks = self._clocked(llm._scheduler.late_masks)  # type: ignore[method-assign]
        launch = llm._runner.launch

        def counted(*arguments: Any) -> None:
            self.steps += 1
            launch(*arguments)

        llm._runner.launch = counted  # type: ignore[method-assign]

    def _clocked(self, method: Callable[[], Any]) -> Callable[[], Any]:
        def clocked() -> Any:
            begun = time.perf_counter()
            try:
                return method()
            finally:
                self.mask_seconds += time.perf_counter() - begun

        return clocked

    def job(self, context: int, new: int, schema: str | None, drawn: bool) -> OfflineJob:
        """One of random ids; drawn ones have a seed of their own."""
        seed = self._source.getrandbits(32)
        ids = [self._source.randrange(1000) for _ in range(context)]
        asked = Asked(
            [Prompt(ids, "prompt", False)],
            SamplingParams(do_sample=drawn, ignore_eos=True),
            TextOptions(),
            FieldNames("n", "max_new_tokens"),
            None,
            new,
            seed=seed,
            constraint=None if schema is None else Constraint("json_schema", schema, "schema"),
        )
        [job] = without_waiting(self._llm.intake.jobs(asked))
        return OfflineJob(job, None)

    def seconds(self, batch: int, context: int, new: int, every: int, drawn: bool) -> float:
        """Of a batch of which every so many rows are constrained; 0: none."""
        jobs = [
            self.job(context, new, ENDLESS if every and number % every == 0 else None, drawn) for number in range(batch)
        ]
        begun = time.perf_counter()
        self._llm._run_all(jobs, False, None)
        taken = time.perf_counter() - begun
        if any(len(job.output().token_ids) != new for job in jobs):
            raise SystemExit("a row ended before the run did")
        return taken

    def compare(self, batch: int, context: int, new: int, drawn: bool, repeats: int) -> dict[str, Any]:
        """Milliseconds per step of each kind of batch."""
        best: dict[str, float] = {}
        masks: dict[str, float] = {}
        for every in KINDS.values():  # compiled, and warm
            self.seconds(batch, context, 4, every, drawn)
        for _, (kind, every) in itertools.product(range(repeats), KINDS.items()):
            first = self.seconds(batch, context, 1, every, drawn)
            self.mask_seconds, self.steps = 0.0, 0
            step = 1e3 * (self.seconds(batch, context, 1 + new, every, drawn) - first) / new
            if step < best.get(kind, float("inf")):
                best[kind], masks[kind] = step, 1e3 * self.mask_seconds / self.steps
        told: dict[str, Any] = {f"{kind}_ms": round(step, 4) for kind, step in best.items()}
        told |= {f"{kind}_masks_ms": round(step, 4) for kind, step in masks.items()}
        told |= {f"{kind}_tokens_s": round(1e3 * batch / step, 1) for kind, step in best.items()}
        told |= {f"{kind}_overhead_percent": round(100 * (step / best["none"] - 1), 2) for kind, step in best.items()}
        return told | {"steps": self.steps, "tokens": 1 + new}

    def pause(self, batch: int, context: int, new: int) -> dict[str, Any]:
        """Milliseconds, of a batch without constrained rows."""
        llm, compiler = self._llm, compiler_of(self._llm.plan)
        told: dict[str, Any] = {}
        for kind in ("alone", "beside a compilation", "alone again"):
            grammars = CompiledGrammars(lambda: compiler)
            gate = GrammarGate(grammars, lambda: compiler)
            for number in range(batch):
                job = self.job(context, new, None, False)
                rejected = llm._scheduler.submit(
                    Submit(1 + number, 0, 1, number, job.prompt_ids, job.params, [0], [[]])
                )
                assert rejected is None
            gaps, last, done, steps = [], time.perf_counter(), 0.0, 0
            while llm._loop.busy:
                llm._loop.turn(lambda: None)
                now = time.perf_counter()
                gaps.append(now - last)
                last, steps = now, steps + 1
                if steps == new // 4:
                    gaps.clear()  # prompts, and what is captured or loaded
                    if kind.startswith("beside"):
                        params = SamplingParams(grammar=translated(Grammar("json_schema", LARGE), "schema"))
                        last = time.perf_counter()
                        gate.holds(Submit(0, 0, 1, 0, [1], params, [0], [[]]), 0.0)
                done = done or (gate.seconds if gate.take() else 0.0)
            while len(gate):  # a thread of low priority, where there are few cores
                select.select([gate], [], [])
                done = gate.seconds if gate.take() else 0.0
            longest = sorted(gaps)[-3:]
            told[kind] = {"longest_ms": [round(1e3 * gap, 2) for gap in longest], "compile_s": round(done, 3)}
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a config.json; default: Llama 3.1 8B's shape")
    parser.add_argument("--batches", default="64", help="numbers with commas")
    parser.add_argument("--contexts", default="512", help="numbers with commas")
    parser.add_argument("--new", type=int, default=256, help="tokens whose mean time is told")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    given = parser.parse_args()
    batches, contexts = ([int(part) for part in text.split(",")] for text in (given.batches, given.contexts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = LLAMA_8B if given.model is None else json.loads((given.model / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder, config["vocab_size"])
        length = max(contexts) + given.new + 8
        parameters = {
            "load_way": "DUMMY",
            "device": given.device,
            "max_req_total_len": length,
            "max_req_input_len": length - 1,
            "running_max_req_size": max(batches) + 1,
            "router_max_wait_tokens": 1,
        }
        with LLM(folder, **{**parameters, **settings(given.set)}) as llm:
            begun = time.perf_counter()
            bench = Bench(llm)
            bench.seconds(1, 16, 2, 1, False)
            print(f"first constrained token after {time.perf_counter() - begun:.2f} s", flush=True)
            gc.collect()
            gc.freeze()
            for batch, context, drawn in itertools.product(batches, contexts, (False, True)):
                told = bench.compare(batch, context, given.new, drawn, given.repeats)
                work = f"decode {batch} @ {context} {'drawn' if drawn else 'greedy'}"
                facts = {"card": llm.plan.device.name, "dtype": llm.plan.data_type}
                print("RESULT", json.dumps({"work": work, **told, **facts}), flush=True)
            paused = bench.pause(max(batches), min(contexts), given.new)
            print("RESULT", json.dumps({"work": f"pause, a schema of {len(LARGE)} characters", **paused}), flush=True)


if __name__ == "__main__":
    main()
