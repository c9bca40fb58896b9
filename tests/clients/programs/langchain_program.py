"""langchain-openai: chat completions, responses, embeddings."""

from __future__ import annotations

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

URL = sys.argv[1]
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    inhabitants: int = Field(ge=1, le=99999999)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


for responses in (False, True):
    made = {"model": "demo", "base_url": f"{URL}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
    model = ChatOpenAI(**made, max_tokens=60, use_responses_api=responses)
    answer = model.invoke(QUESTION)
    assert "Paris" in answer.text, answer
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == answer.text
    city = model.with_structured_output(City, method="json_schema").invoke("Paris is a city. Describe it as JSON.")
    assert isinstance(city, City)
    tools = model.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
    called = tools.invoke("What is the weather in Paris?")
    (call,) = called.tool_calls
    assert (call["name"], list(call["args"])) == ("get_weather", ["city"]), call
    chunks = [*tools.stream("What is the weather in Paris?")]
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [one["args"] for one in whole.tool_calls] == [call["args"]]
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    end = model.bind_tools([get_weather]).invoke([HumanMessage("What is the weather in Paris?"), called, result])
    assert end.text or end.tool_calls

going_on = ChatOpenAI(**made, max_tokens=20, use_responses_api=True, use_previous_response_id=True)
first = going_on.invoke([HumanMessage("My name is Ada.")])
second = going_on.invoke([HumanMessage("My name is Ada."), first, HumanMessage("What is my name?")])
assert second.usage_metadata["input_tokens"] > first.usage_metadata["input_tokens"] + 5

embeddings = OpenAIEmbeddings(model="demo", base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False)
one, two = embeddings.embed_documents(["Paris", "a tree"])
assert len(one) == len(two) > 1
assert one != two
print("langchain-openai works")
