"""The llm command: prompts, streams, schemas, conversations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = sys.argv[1]
QUESTION = "What is the capital of France?"
MODEL = f"""
- model_id: demo
  model_name: demo
  api_base: {URL}/v1
  supports_schema: true
  supports_tools: true
- model_id: demo-plain
  model_name: demo
  api_base: {URL}/v1
  completion: true
"""

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "extra-openai-models.yaml").write_text(MODEL)
    environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def llm(*words: str) -> str:
        """What the command prints."""
        command = [str(Path(sys.executable).parent / "llm"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    asked = ("-m", "demo", "-o", "temperature", "0", "-o", "max_tokens", "60")
    answer = llm(*asked, "--no-stream", QUESTION)
    assert "Paris" in answer, answer
    assert llm(*asked, QUESTION) == answer
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}
    told = json.loads(llm(*asked, "--schema", json.dumps(schema | {"additionalProperties": False}), QUESTION))
    assert list(told) == ["name"]
    assert llm("-c", "-m", "demo", "And of Spain?", "-o", "max_tokens", "20")
    assert "Paris" in llm(
        "-m", "demo-plain", "-o", "temperature", "0", "-o", "max_tokens", "6", "The capital of France is"
    )
    tools = "def weather(city: str) -> str:\n    'The weather in a city'\n    return 'sunny'"
    assert llm(*asked, "--functions", tools, "What is the weather in Paris?")
print("llm works")
