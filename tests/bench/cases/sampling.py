"""From fp32 logits to tokens: greedy, drawn, and drawn under limits."""

from __future__ import annotations

import numpy as np
import torch
from cases.timing import Deadline, Report, copies_for, median_us

from lightllmd.kernels.sampling import sample
from lightllmd.kernels.sampling_rows import DRAWN, LIMITED, PARAMETERS, TYPICAL

VOCAB = 128256
ROWS = (1, 64, 256)
CASES = {
    "greedy": (0, 1.0, 2.0, VOCAB),
    "temperature 0.8": (DRAWN.value, 1 / 0.8, 2.0, VOCAB),
    "top-p 0.9, top-k 50": (DRAWN.value + LIMITED.value, 1.0, 0.9, 50),
    "typical-p 0.9": (DRAWN.value + LIMITED.value + TYPICAL.value, 1.0, 2.0, VOCAB),
}


def measure(report: Report) -> None:
    deadline = Deadline(60)
    for rows in ROWS:
        for name, case in CASES.items():
            if deadline.passed(f"{name} of {rows}"):
                return
            with report.case(f"sample {rows} {name}"):
                run(name, rows, *case, report)


def run(name: str, rows: int, flags: int, inverse: float, top_p: float, top_k: int, report: Report) -> None:
    size = 4 * rows * VOCAB
    # As peaked as a model's: some 1.5 nats of entropy.
    logits = [torch.randn(rows, VOCAB, device="cuda") * 4 for _ in range(copies_for(size, most=32))]
    packed = np.zeros(rows, PARAMETERS)
    packed["flags"], packed["inverse_temperature"], packed["top_p"], packed["top_k"] = flags, inverse, top_p, top_k
    packed["repetition"], packed["decay_factor"], packed["seed"] = 1.0, 1.0, np.arange(rows)
    parameters = torch.from_numpy(packed.view(np.int32).reshape(rows, -1)).cuda()
    index = torch.arange(rows, device="cuda", dtype=torch.int32)
    counts = torch.zeros(rows, VOCAB, device="cuda", dtype=torch.int16)
    eos = torch.zeros(1, device="cuda", dtype=torch.int32)
    last = torch.full((rows,), -1, device="cuda", dtype=torch.int32)

    typical = torch.full((rows,), 0.9, device="cuda") if flags & TYPICAL.value else None

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain, search = flags == 0, bool(flags & LIMITED.value)
        return sample(x, parameters, index, index, counts, eos, None, last, plain, search, typical=typical)

    truth = logits[0].clone()
    tokens, logprobs, *_ = call(logits[0])
    ranks = (truth > truth.gather(1, tokens.long()[:, None])).sum(1)
    if int(ranks.max()) >= (1 if flags == 0 else top_k) or not torch.equal(last, tokens):
        raise ValueError(f"tokens outside the limits: ranks up to {int(ranks.max())}")
    expected = truth.log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-3, atol=1e-3)
    us = median_us([lambda x=x: call(x) for x in logits])
    report.result("sample", case=name, rows=rows, us=us, gbps=size / us / 1e3)
