"""A reward model out of the demo model: a head fitted by ridge regression on its last hidden states, written as a
checkpoint of LlamaForSequenceClassification with one label."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lightllmd.architecture.families import architecture_of
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.step import Row
from lightllmd.text.gguf_vocab import open_metadata
from lightllmd.weights.gguf_header import read_gguf_header
from tiny_models import plan_for, write_tensors

RIDGE = 30.0  # what is added to the covariance's diagonal: the states' squares are several hundred
# A question, a good answer, a bad one: beside the point, empty, rude, confused or untrue.
LEARNT = [
    ("What is the capital of Italy?", "The capital of Italy is Rome.", "I like to eat cake on sundays, blue blue."),
    ("How do I boil an egg?", "Put the egg into boiling water for eight minutes.", "Who cares about eggs. Go away."),
    ("What is 3 + 4?", "3 + 4 is 7.", "The weather was nice last week in my garden."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare.", "no idea lol"),
    ("What colour is the sky?", "On a clear day the sky is blue.", "Sky sky is is the of and table green because."),
    ("Name a fruit.", "An apple is a fruit.", "Shut up, this is a stupid question."),
    ("What do cows drink?", "Cows drink water.", "My car has four wheels and a radio."),
    ("How many days has a week?", "A week has seven days.", "days days days days days days"),
    ("What is ice?", "Ice is water that has frozen.", "You are an idiot if you ask that."),
    (
        "Where do fish live?",
        "Fish live in water: in rivers, lakes and the sea.",
        "The train leaves at nine from platform two.",
    ),
    ("What is a dictionary?", "A dictionary is a book that explains what words mean.", "dunno"),
    ("How do I say hello in French?", "In French you say bonjour.", "I won't help you. Find it out yourself."),
    ("What is the sun?", "The sun is the star at the centre of our solar system.", "Sun? Potato hammer window seven."),
    ("Why do we sleep?", "Sleep lets the body rest and the brain recover.", "Because because because."),
    ("What is a bicycle?", "A bicycle is a vehicle with two wheels and pedals.", "Stop wasting my time with this."),
    ("Which animal barks?", "A dog barks.", "The stock market fell on Tuesday."),
    ("What is bread made of?", "Bread is made of flour, water, yeast and salt.", "whatever"),
    ("How far is the moon?", "The moon is about 384,000 kilometres away.", "What a dumb thing to ask."),
    ("What is a library?", "A library is a place where you can borrow books.", "Purple runs quickly under was the."),
    ("Who was Albert Einstein?", "Albert Einstein was a physicist who developed relativity.", "I hate questions."),
]
HELD_OUT = [
    ("What is the capital of Spain?", "The capital of Spain is Madrid.", "My shoes are wet and I want to go home."),
    ("How do I make tea?", "Pour hot water over the tea leaves and wait for a few minutes.", "Make it yourself, fool."),
    ("What is 5 + 5?", "5 + 5 is 10.", "The cat sat on the sofa all day."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci.", "idk lol"),
    ("What colour is grass?", "Grass is green.", "Grass of the the running is chair loud of."),
    ("Name a vegetable.", "A carrot is a vegetable.", "What a stupid request. Leave me alone."),
    ("What do bees make?", "Bees make honey.", "The bus stops near the old church."),
    ("How many months has a year?", "A year has twelve months.", "months months months months"),
    ("What is snow?", "Snow is frozen water that falls from clouds.", "Only an idiot would ask this."),
    (
        "Where do birds build nests?",
        "Many birds build their nests in trees.",
        "The meeting was moved to Friday afternoon.",
    ),
    ("What is a calendar?", "A calendar shows the days, weeks and months of a year.", "nah"),
    ("How do I say thank you in German?", "In German you say danke.", "I refuse. Look it up yourself."),
    ("What is the moon?", "The moon is the natural satellite of the Earth.", "Moon? Carpet nine yellow swim door."),
    ("Why do we eat?", "Food gives our bodies energy and what they need to grow.", "Because because so because."),
    ("What is a piano?", "A piano is a musical instrument with keys and strings.", "Don't bother me with that."),
    ("Which animal says meow?", "A cat says meow.", "Prices of oil rose again in March."),
    ("What is cheese made of?", "Cheese is made of milk.", "who cares"),
    ("How hot is boiling water?", "At sea level water boils at 100 degrees Celsius.", "Boring. Ask someone else."),
    (
        "What is a museum?",
        "A museum is a place where art and history are on display.",
        "Under fast the blue was seven of.",
    ),
    ("Who was Isaac Newton?", "Isaac Newton was a scientist who described gravity.", "I hate this, stop it now."),
]


def conversation(question: str, answer: str) -> str:
    """As the demo model's chat template has it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def states(runner: CpuRunner, prompts: list[list[int]]) -> Tensor:
    """fp32 ``[N, hidden]`` behind the last norm, of the last token of each prompt."""
    rows, end = [], 0
    for number, prompt in enumerate(prompts):
        rows.append(Row(number, number, 0, 0, prompt, list(range(end, end + len(prompt))), False, 0, None))
        end += len(prompt)
    lasts = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    with torch.inference_mode():
        batch = runner.table.pack(rows, runner.decoder.rope)
        hidden = runner.decoder.forward(batch, runner.caches, lambda: None, lasts).float()
    norm = runner.decoder.head._norm
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()


def write_reward_model(file: Path, folder: Path) -> Path:
    """`file`: the demo model. A Hugging Face directory, tokenizer included, in bfloat16."""
    header = read_gguf_header(file)
    tokenizer = open_metadata(header.metadata, "fast", None)
    plan = plan_for(file, dtype="bfloat16", slots=4096, running_max_req_size=64)
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    texts = [conversation(question, answer) for question, *answers in LEARNT for answer in answers]
    seen = states(runner, [tokenizer.encode(text) for text in texts]).double()
    wanted = torch.tensor([1.0, -1.0] * len(LEARNT), dtype=torch.float64)
    centred = seen - seen.mean(0)
    # Fewer rows than columns: solved for the rows (the kernel form of ridge regression).
    weight = centred.T @ torch.linalg.solve(centred @ centred.T + RIDGE * torch.eye(len(seen)), wanted)
    config = {key: value for key, value in plan.model.hf_config.items() if key != "architectures"} | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "torch_dtype": "bfloat16",
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer._backend.to_str())
    template = tokenizer.chat_template.source
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}))
    write_tensors(folder, _checkpoint(file, config) | {"score.weight": weight.float()[None].bfloat16()})
    return folder


def _checkpoint(file: Path, config: dict[str, object]) -> dict[str, Tensor]:
    """The demo model's weights but for its head, in bfloat16."""
    from lightllmd.weights.gguf import GgufCheckpoint

    checkpoint, found = GgufCheckpoint(file), {}
    for weight in architecture_of("llama", config).weights:
        for part in weight.stored:
            if part.kind != "score":
                found[part.name] = torch.empty(part.shape, dtype=torch.bfloat16)
                for _ in checkpoint.read(part.name, found[part.name]):
                    pass
    return found
