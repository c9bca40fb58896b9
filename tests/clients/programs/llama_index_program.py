"""llama-index: OpenAILike and OpenAILikeEmbedding."""

from __future__ import annotations

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

URL = sys.argv[1]
QUESTION = [ChatMessage(role="user", content="What is the capital of France?")]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


made = {
    "model": "demo",
    "api_base": f"{URL}/v1",
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 60,
    "max_retries": 0,
}
model = OpenAILike(**made, is_chat_model=True, is_function_calling_model=True)
answer = model.chat(QUESTION).message.content
assert "Paris" in answer, answer
assert "".join(part.delta or "" for part in model.stream_chat(QUESTION)) == answer
plain = OpenAILike(**made, is_chat_model=False)
text = plain.complete("The capital of France is").text
assert "Paris" in text
assert "".join(part.delta or "" for part in plain.stream_complete("The capital of France is")) == text

weather = FunctionTool.from_defaults(get_weather)
called = model.chat_with_tools([weather], "What is the weather in Paris?", tool_required=True)
(call,) = model.get_tool_calls_from_response(called)
assert (call.tool_name, list(call.tool_kwargs)) == ("get_weather", ["city"])
result = ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
asked = ChatMessage(role="user", content="What is the weather in Paris?")
assert model.chat([asked, called.message, result]).message.content
city = model.as_structured_llm(City).chat([ChatMessage(role="user", content="Name the capital of France.")]).raw
assert isinstance(city, City)

embedding = OpenAILikeEmbedding(model_name="demo", api_base=f"{URL}/v1", api_key="none")
one, two = embedding.get_text_embedding_batch(["Paris", "a tree"])
assert len(one) == len(two) > 1
print("llama-index works")
