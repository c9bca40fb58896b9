"""The log-statistics line: average throughput since the last one, while a batch runs."""

from __future__ import annotations


class Statistics:
    """Counts tokens; says every `interval` seconds how many there were per second. Times are monotonic seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._since: float | None = None  # when the present window began; None: nothing runs
        self._prompt = self._generated = 0

    def count(self, prompt: int, generated: int, now: float) -> bool:
        """A step that fed `prompt` tokens of prompts and produced `generated`; True when a line is due."""
        if self._since is None:
            self._since = now
        self._prompt += prompt
        self._generated += generated
        return now - self._since >= self._interval

    def line(self, now: float) -> str:
        """The averages of the window that ends; a new one begins."""
        seconds = max(1e-9, now - (self._since if self._since is not None else now))
        prompt, generated = self._prompt / seconds, self._generated / seconds
        self._since, self._prompt, self._generated = now, 0, 0
        return (
            f"avg tokens (prompt+generate) throughput {prompt + generated:.1f} tokens/s, "
            f"prompt {prompt:.1f} tokens/s, generate {generated:.1f} tokens/s"
        )

    def idle(self) -> None:
        """Nothing runs any more: idle time is not part of an average."""
        self._since, self._prompt, self._generated = None, 0, 0
