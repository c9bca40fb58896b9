"""pydantic-ai: agents on chat completions, responses and Anthropic's messages."""

from __future__ import annotations

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

URL = sys.argv[1]
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)


openai = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
MODELS = (
    OpenAIChatModel("demo", provider=openai),
    OpenAIResponsesModel("demo", provider=openai),
    AnthropicModel("demo", provider=AnthropicProvider(base_url=URL, api_key="none")),
)
SETTINGS = {"temperature": 0.0, "max_tokens": 60}


async def main() -> None:
    """Text, a stream of it, objects, a conversation."""
    for model in MODELS:
        agent = Agent(model, model_settings=SETTINGS, retries=0)
        answer = await agent.run(QUESTION)
        assert "Paris" in answer.output, (model, answer.output)
        async with agent.run_stream(QUESTION) as stream:
            assert [text async for text in stream.stream_text()][-1] == answer.output
        following = await agent.run("And of Spain?", message_history=answer.all_messages())
        assert following.usage.input_tokens > answer.usage.input_tokens
        by_tool = Agent(model, output_type=ToolOutput(City), model_settings=SETTINGS, retries=0)
        assert isinstance((await by_tool.run(QUESTION)).output, City), model
        if isinstance(model, AnthropicModel):
            continue  # what it knows of the model's name decides whether it asks for structured text
        by_schema = Agent(model, output_type=NativeOutput(City), model_settings=SETTINGS, retries=0)
        assert isinstance((await by_schema.run(QUESTION)).output, City), model


asyncio.run(main())
print("pydantic-ai works")
